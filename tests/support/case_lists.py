"""Manifests and cases made up for tests of a hospital's list of cases."""

from pathlib import Path

import pytest

from fedsgcg.clients.data.case_files import CaseFile
from fedsgcg.common.errors import FedsgcgError


def root_with(folder, header, *lines, files=()):
    folder.mkdir(exist_ok=True)
    (folder / "manifest.csv").write_text("\n".join([header, *lines]) + "\n")
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def problems_of(call, *arguments):
    with pytest.raises(FedsgcgError) as caught:
        call(*arguments)
    return caught.value.problems


def case(patient, split=None, name=None):
    return CaseFile("S", name or patient, Path("i"), Path("m"), patient, split)
