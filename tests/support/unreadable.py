"""The error code of an image that cannot be read."""

import pytest

from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.images.read import read_volume


def code_of(path, **options):
    with pytest.raises(FedsgcgError) as caught:
        read_volume(path, **options)
    assert str(path) in caught.value.problems[0].where
    return caught.value.code
