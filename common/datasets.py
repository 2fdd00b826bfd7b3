"""The published data sets that fedsgcg has settings for: hospitals, case numbers, terms, source.

Nothing is read or downloaded here; `deploy.prepare` converts a downloaded folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Hospital:
    """One hospital of a published data set.

    Attributes:
        name: Name of its folder after preparation.
        source: What its publishers call it.
        train: Published number of training cases; all cases where the publishers made no split.
        test: Published number of test cases; 0 where the publishers made no split.
    """

    name: str
    source: str
    train: int
    test: int = 0


@dataclass(frozen=True)
class DataSet:
    """A published data set.

    Attributes:
        name: As in `data=NAME` and `fedsgcg data prepare NAME`.
        title: What it shows.
        hospitals: The hospitals, in the order of the papers.
        counted: Source of the numbers of cases.
        terms: Licence or terms of use, as far as known.
        size: Number, size and format of the images.
        cite: What to cite.
        links: Where the publishers offer the files.
        fetch: Steps to download the files, one sentence each.
        layouts: Folder layouts that `prepare` reads.
    """

    name: str
    title: str
    hospitals: tuple[Hospital, ...]
    counted: str
    terms: str
    size: str
    cite: str
    links: tuple[str, ...]
    fetch: tuple[str, ...]
    layouts: tuple[str, ...]


FUNDUS: Final = DataSet(
    name="fundus",
    title="optic disc and cup in colour fundus photographs, 800 x 800 crops around the disc",
    hospitals=(
        Hospital("Domain1", "Drishti-GS", 50, 51),
        Hospital("Domain2", "RIM-ONE r3", 99, 60),
        Hospital("Domain3", "REFUGE, training part", 320, 80),
        Hospital("Domain4", "REFUGE, validation part", 320, 80),
    ),
    counted="list files of RAM-DSIR (github.com/zzzqzhou/RAM-DSIR, dataset/fundus)",
    terms=(
        "research only, no redistribution: RIM-ONE r3 forbids it in its README; Drishti-GS and "
        "REFUGE require registration and have their own terms, which you accept there"
    ),
    size=(
        "1,060 colour pictures with masks; the released crops are PNG of 800 x 800 pixels, the "
        "original photographs are larger, and those of RIM-ONE r3 are stereo pairs"
    ),
    cite=(
        "Wang et al., DoFE, IEEE TMI 2020; Sivaswamy et al. 2014; Fumero et al. 2015; "
        "Orlando et al., REFUGE, 2020"
    ),
    links=(
        "github.com/emma-sjwang/Dofe",
        "cvit.iiit.ac.in (Drishti-GS1)",
        "medimrg.webs.ull.es (RIM-ONE r3)",
        "refuge.grand-challenge.org",
    ),
    fetch=(
        "The released crops: follow the data link in github.com/emma-sjwang/Dofe (Google Drive "
        "file 1p33nsWQaiZMAgsruDoJLyatoq5XAH-TH) and unpack it.",
        "Optional: copy DomainN_train.list and DomainN_test.list of github.com/zzzqzhou/RAM-DSIR "
        "(dataset/fundus) next to the folders Domain1 to Domain4; without them the published "
        "names that ship with fedsgcg are used.",
        "Or the original releases, unpacked below one folder: Drishti-GS1 (cvit.iiit.ac.in), "
        "RIM-ONE r3 (medimrg.webs.ull.es), REFUGE Training400 and Validation400 with their "
        "Disc_Cup_Masks (refuge.grand-challenge.org).",
    ),
    layouts=(
        "Domain1 ... Domain4, each with train/ROIs/image, train/ROIs/mask, test/ROIs/image, "
        "test/ROIs/mask",
        "the original releases anywhere below one folder, with their own file names",
    ),
)

PROSTATE: Final = DataSet(
    name="prostate",
    title="whole prostate in T2-weighted MRI, 384 x 384 in plane",
    hospitals=(
        Hospital("RUNMC", "ISBI (NCI-ISBI 2013, 3 T)", 30),
        Hospital("BMC", "ISBI_1.5 (NCI-ISBI 2013, 1.5 T)", 30),
        Hospital("I2CVB", "I2CVB (HCRUDB)", 19),
        Hospital("UCL", "PROMISE12, UCL", 13),
        Hospital("BIDMC", "PROMISE12, BIDMC", 12),
        Hospital("HK", "PROMISE12, HK", 12),
    ),
    counted=(
        "recalled from the papers; the training lists in github.com/liuquande/SAML have as many "
        "names"
    ),
    terms=(
        "research with citation; the three sources (NCI-ISBI 2013, I2CVB, PROMISE12) have their "
        "own terms"
    ),
    size=("116 volumes, NIfTI, 384 x 384 in plane"),
    cite=(
        "Liu et al., SAML, MICCAI 2020; Bloch et al. 2015; Lemaitre et al. 2015; "
        "Litjens et al. 2014"
    ),
    links=("liuquande.github.io/SAML",),
    fetch=(
        "Follow the data link on liuquande.github.io/SAML and unpack it: one folder per site with "
        "CaseNN.nii.gz and CaseNN_segmentation.nii.gz.",
        "The processed slices that RAM-DSIR links to (.npy) are not complete volumes and cannot "
        "be used.",
    ),
    layouts=(
        "RUNMC or ISBI, BMC or ISBI_1.5, I2CVB or HCRUDB, UCL, BIDMC, HK, each with "
        "CaseNN[_segmentation].nii.gz",
    ),
)

PROMISE12: Final = DataSet(
    name="promise12",
    title="whole prostate in T2-weighted MRI, 128 x 128 copy, nominal spacing",
    hospitals=(
        Hospital("RUNMC", "cases 13-25", 13),
        Hospital("UCL", "cases 01, 26-37", 13),
        Hospital("BIDMC", "cases 00, 02-12", 12),
        Hospital("HK", "cases 38-49", 12),
    ),
    counted="PROMISE12 training cases of four hospitals",
    terms="research with citation; no statement that allows redistribution was found",
    size=(
        "50 volumes with masks; the files of the challenge are MetaImage (.mhd with .raw), the "
        "128-pixel copy is 27 MB as NIfTI"
    ),
    cite=(
        "Litjens et al., Medical Image Analysis 18(2), 359-373, 2014 "
        "(doi 10.1016/j.media.2013.12.002)"
    ),
    links=(
        "zenodo.org/records/8026660",
        "github.com/YipengHu/promise12 (branch data)",
    ),
    fetch=(
        "The challenge's own files: Zenodo record 8026660, training_data, unpacked; the hospital "
        "of each case is known. Their spacing is true: add data.spacing_unit=mm to the study.",
        "Or a 128-pixel copy: image_train00..49.npy and label_train00..49.npy of "
        "github.com/YipengHu/promise12, branch data. Save each case as NIfTI "
        "<SITE>/CaseNN_image.nii.gz and <SITE>/CaseNN_mask.nii.gz (RUNMC 13-25, UCL 01 and 26-37, "
        "BIDMC 00 and 02-12, HK 38-49).",
    ),
    layouts=(
        "CaseNN.mhd with CaseNN_segmentation.mhd and their .raw, as the challenge has them, in one "
        "folder or in TrainingData_Part1 to Part3",
        "manifest.csv, or one folder per hospital with CaseNN_image.nii.gz and CaseNN_mask.nii.gz",
    ),
)

SPINEGM: Final = DataSet(
    name="spinegm",
    title="spinal cord and its grey matter in T2*-weighted MRI",
    hospitals=(
        Hospital("CEITEC", "sub-10062, two sessions", 2),
        Hospital("Juntendo", "sub-9669", 1),
        Hospital("Milan", "sub-9709, two sessions", 2),
        Hospital("NWU", "sub-9584", 1),
        Hospital("Philips", "sub-9604", 1),
        Hospital("UCL", "sub-9418", 1),
    ),
    counted="volumes that have image and both labels in the public repository",
    terms=(
        "CC0 1.0 (public domain); please credit the Spinal Cord Gray Matter Imaging Challenge "
        "nevertheless"
    ),
    size=("8 volumes, 143 slices with both labels, NIfTI; cropped to 128 x 128 they have 3 MB"),
    cite="github.com/sct-pipeline/gm-challenge-data",
    links=("github.com/sct-pipeline/gm-challenge-data",),
    fetch=(
        "Clone github.com/sct-pipeline/gm-challenge-data (BIDS; labels in derivatives/labels); its "
        "images may need git lfs pull or git annex get.",
    ),
    layouts=(
        "the repository: sub-*/anat, and *_seg-manual and *_gmseg-manual in derivatives/labels",
        "manifest.csv, or one folder per hospital with <case>_image.nii.gz and <case>_mask.nii.gz",
    ),
)

CATALOGUE: Final = {data_set.name: data_set for data_set in (FUNDUS, PROSTATE, PROMISE12, SPINEGM)}

OWN_DATA: Final = (
    "Your own images: a folder for each hospital with images and masks whose names belong together "
    "(<case>_image with <case>_mask, or a mask file for each structure), DICOM series with "
    "segmentations, folders of nnU-Net or BIDS, or a CSV file with the columns site, image, mask "
    "and optionally patient_id and split. `fedsgcg data prepare SOURCE -o FOLDER` checks and "
    "copies them and writes FOLDER/data.yaml, the settings for `fedsgcg study data=...`. If "
    "neither folders nor a table name the hospitals, add --hospitals."
)


def fetch_advice(name: str) -> str:
    """Return how to download and prepare `data=NAME`.

    Returns:
        Lines of text. For a name that is not a published data set, the layout of own data.
    """
    if name == "synthetic":
        return "The synthetic hospitals need no download: they are written when first used."
    data_set = CATALOGUE.get(name)
    if data_set is None:
        return OWN_DATA
    steps = [f"{number}. {step}" for number, step in enumerate(data_set.fetch, 1)]
    prepare = (
        f"{len(steps) + 1}. fedsgcg data prepare {name} DOWNLOADED -o FOLDER, "
        "then set data.root=FOLDER"
    )
    head = f"fedsgcg downloads nothing. To get {name} ({data_set.title}):"
    terms = f"Terms: {data_set.terms}."
    cite = f"Cite: {data_set.cite}."
    return "\n".join([head, *steps, prepare, terms, cite])
