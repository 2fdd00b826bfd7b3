"""Calls of `fedsgcg data prepare`, what they wrote, and a download of the prostate data."""

import csv

from fedsgcg.deploy.cli.coordinator import main
from tests.support import downloads


def prepare(*arguments):
    return main(["data", "prepare", *map(str, arguments)])


def manifest(folder):
    with (folder / "manifest.csv").open() as file:
        return list(csv.DictReader(file))


def report(folder):
    return (folder / "prepared.txt").read_text()


def saml(root, sites, *, case="Case{:02d}", mask="_segmentation"):
    made = {}
    for site, numbers in sites.items():
        for number in numbers:
            image, labels = downloads.scan(number)
            stem = case.format(number)
            made[site, number] = (
                downloads.volume(root / site / f"{stem}.nii.gz", image),
                downloads.volume(root / site / f"{stem}{mask}.nii.gz", labels),
            )
    return made
