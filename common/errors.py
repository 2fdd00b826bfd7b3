"""Error codes and errors: a code, what was found, what was expected and what to do.

A `FedsgcgError` may name a file and therefore a patient. That is useful inside a hospital, but only
`FedsgcgError.public()`, the code without any free text, may be sent.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final

from fedsgcg.common.names import printable

CODES: Final[dict[str, str]] = {
    # CFG: settings, before anything starts
    "CFG-001": "The settings are not valid.",
    "CFG-002": "The held-out hospital does not exist.",
    "CFG-003": "A leave-one-hospital-out study needs at least two hospitals.",
    "CFG-004": "The requested device is not available.",
    "CFG-005": "The run folder belongs to a run with other settings.",
    "CFG-006": "Another process is using the run folder.",
    "CFG-007": "The Ray cluster cannot be reached.",
    "CFG-008": "The file system offers no file locks.",
    "CFG-009": "There is no home directory.",
    "CFG-010": "The path of the temporary folder is too long for Ray.",
    "CFG-011": "The class of an import path cannot be used.",
    "CFG-020": "The aggregation rule does not fit the plan.",
    "CFG-030": "No plan of the data is possible.",
    "CFG-031": "The source hospitals have different kinds of images.",
    "CFG-032": "data.plan=auto is for simulations.",
    "CFG-040": "The reference does not fit the study.",
    "CFG-041": "Real hospitals cannot run a comparison without the federation.",
    "CFG-042": "The method does not fit the rule or the hospitals.",
    "CFG-043": "The measured costs cannot be written.",
    # DAT: the data of a hospital
    "DAT-101": "The data folder or its manifest cannot be used.",
    "DAT-102": "The hospital has no usable case.",
    "DAT-103": "A file cannot be read as an image.",
    "DAT-104": "The mask does not have the shape of its image.",
    "DAT-105": "The mask and its image do not occupy the same space.",
    "DAT-106": "The image has more dimensions than a volume or a picture.",
    "DAT-107": "The image has values that are not finite.",
    "DAT-108": "The image is constant.",
    "DAT-109": "The mask has a label value that is not declared.",
    "DAT-110": "The mask is empty.",
    "DAT-111": "A patient is in more than one split.",
    "DAT-112": "The case has no mask.",
    "DAT-113": "The slice cache cannot be written or read.",
    "DAT-115": "The image has no fixed intensity scale.",
    "DAT-116": "The mask is stored in a format that changes its label values.",
    "DAT-117": "The images are of different kinds: pictures, or volumes of different planes.",
    "DAT-118": "Hospitals' names differ only in Unicode form or case.",
    "DAT-119": "Files in the folder are not used.",
    # DAT-12x: preparing a downloaded data set
    "DAT-120": "The data set was not found.",
    "DAT-121": "The output folder cannot be used.",
    "DAT-122": "A file of the data set is missing.",
    "DAT-123": "A file does not belong to the data set.",
    "DAT-124": "The number of cases is not the published one.",
    "DAT-125": "The case cannot be converted.",
    "DAT-126": "The output folder cannot be written.",
    "DAT-127": "The names do not say which mask belongs to which image.",
    "DAT-128": "Contours are stored as an RT structure set.",
    "DAT-129": "The hospital of a case is not known.",
    # DAT-13x: slices
    "DAT-130": "The stack of slices does not fit the images.",
    # DAT-16x: formats
    "DAT-160": "A library that reads or writes this format is not installed.",
    "DAT-161": "The DICOM series has a gap.",
    "DAT-162": "The folder has more than one DICOM series or segmentation.",
    "DAT-163": "The slices of the DICOM series do not form a stack.",
    "DAT-164": "The DICOM segmentation does not refer to this series.",
    "DAT-165": "The masks or segments do not fit the classes.",
    "DAT-166": "The masks of structures contradict each other.",
    "DAT-167": "The case has several images or masks.",
    "DAT-168": "The hospital's volumes have several formats.",
    "DAT-169": "The orientation of the image is not known.",
    # DAT-17x: checking all hospitals' data before a study
    "DAT-170": "The folder has no settings of its data.",
    "DAT-171": "Two hospitals have the same image.",
    "DAT-172": "A declared class occurs in no mask.",
    "DAT-173": "The picture sheet cannot be written.",
    "DAT-174": "The masks of a hospital do not fit the declared classes.",
    # DAT-18x: recognising the layouts of other tools
    "DAT-180": "The BIDS folder has no labels.",
    "DAT-181": "dataset.json cannot be used, or contradicts the files.",
    "DAT-182": "A label table cannot be used, or has a name or value twice.",
    "DAT-183": "The folder is not complete.",
    # DAT-19x: checking and planning, continued
    "DAT-190": "The image has no voxel size, which data.spacing needs.",
    "DAT-191": "Two hospitals have the same patient.",
    "DAT-192": "Colour and grey pictures are used together.",
    "DAT-193": "The hospital has no validation patient.",
    "DAT-198": "Two DICOM segmentations of a series draw the same structure.",
    # MOD: using a model
    "MOD-801": "The model's files cannot be read.",
    "MOD-802": "The model was written by another version.",
    "MOD-803": "The weights do not match the hash in the model's description.",
    "MOD-804": "The weights do not fit the model's network.",
    "MOD-805": "The labels do not fit.",
    "MOD-806": "The image is not of the kind that the model was trained on.",
    "MOD-807": "The model's prototypes cannot be used.",
    "MOD-808": "The predictions cannot be written.",
    "MOD-809": "There is no image to predict.",
    "MOD-810": "The image could not be predicted.",
    "MOD-811": "The model's description is not the one that was written with its weights.",
    "MOD-812": "The result cannot be written in the format.",
    "MOD-813": "The list of predictions cannot be read.",
    "MOD-820": "The model cannot be adapted to the images.",
    # ROL: roles and consent
    "ROL-201": "A site was asked for something its role forbids.",
    "ROL-202": "A site was asked to share what its own file does not allow.",
    "ROL-211": "A method cannot use a hospital without labels.",
    "ROL-212": "A site without labels was asked for, or sent, what needs labels.",
    # POL: the site's own policy, which takes precedence over the coordinator
    "POL-701": "The site's own settings do not match the site that the request is for.",
    "POL-702": "A path is outside the site's data folder.",
    "POL-703": "The coordinator set something that the site does not allow it to set.",
    "POL-704": "The site does not allow this part to leave.",
    "POL-705": "The app bundle is not approved at this site.",
    "POL-706": "The site does not run code from outside the approved app bundle.",
    "POL-707": "The request exceeds a limit of the site.",
    "POL-708": "The installed software is not what this site approved.",
    "POL-720": "The release, or its difference from an earlier one, covers too few patients.",
    "POL-721": "The site's budget of releases or evaluations is spent.",
    "POL-722": "The request samples the data in another way than the site accepts.",
    "POL-723": "The round would train on too few patients or slices.",
    "POL-724": "The model's prediction does not depend on the image.",
    # PAY and STA: what a site sent
    "PAY-101": "The weights have values that are not finite.",
    "PAY-103": "The weights do not have the names and shapes of the network.",
    "PAY-105": "A part of the payload is larger than its limit.",
    "PAY-106": "The payload cannot be decoded.",
    "PAY-107": "The payload has another schema version.",
    "PAY-110": "A count is not a positive whole number.",
    "PAY-111": "A count is larger than the site can have.",
    "PAY-112": "A value is outside its possible range.",
    "PAY-113": "The update is far larger than those of the other sites.",
    "PAY-114": "The update opposes the direction that the other sites share.",
    "PAY-115": "The site returned the model that it received.",
    "PAY-116": "The payload is a copy of another one.",
    "PAY-120": "The payload belongs to another run, fold, round or plan.",
    "PAY-121": "The control variates are not valid.",
    "PAY-122": "A weight's change is outside the range of the codec.",
    "PAY-123": "The weights are coded against those of another request.",
    "STA-201": "The class statistics are not valid.",
    "STA-202": "The moments of the normalisation layers are not valid.",
    "STA-203": "Too few classes have prototypes: the contrastive loss is off.",
    # STA-21x: screens of statistics, and merged results
    "STA-211": "The class statistics are far from those of the other sites.",
    "STA-212": "The moments of the normalisation layers are far from those of the other sites.",
    "STA-213": "A merged result is not finite.",
    "STA-214": "The model has no prototypes: no site's class statistics were admitted.",
    # TRN: training at a site
    "TRN-301": "The training loss is not finite.",
    "TRN-302": "The site has no training case.",
    "TRN-311": "The site's images have no neighbouring slices for pairs.",
    "TRN-320": "The method does not fit the network.",
    "TRN-330": "The model cannot be adapted to the hospital's images.",
    # RND: the round loop
    "RND-401": "Not all sites that the run needs joined in a usable state before the deadline.",
    "RND-402": "Fewer sites than the quorum answered the round before the deadline.",
    "RND-403": "The held-out hospital did not answer the evaluation.",
    "RND-404": "A site did not answer before the round's deadline.",
    "RND-405": "No site has a validation case: the last model is used.",
    "RND-406": "A site's data changed during the run.",
    "RND-407": (
        "A site left permanently: its statistics were removed, "
        "the weights keep what they learned from it."
    ),
    "RND-408": "Two hospitals have the same images.",
    "RND-410": "A worker of the simulation was lost.",
    "RND-421": "The round is void: too few replies were admitted, and the previous model is kept.",
    "RND-422": "A site is paused after three rejections in a row.",
    # SRV: the coordinator's disk
    "SRV-401": "The run folder cannot be written.",
    "SRV-402": "A file of the run folder is damaged.",
    "SRV-403": "A file of the run folder was changed after the run.",
    # DEP: deployment: kits, certificates, keys, the coordinator's server
    "DEP-601": "The site file cannot be used.",
    "DEP-602": "The project file cannot be used.",
    "DEP-603": "A key or certificate cannot be used.",
    "DEP-604": "There is no coordinator kit.",
    "DEP-605": "The kit does not belong to this project.",
    "DEP-606": "The site is not part of the federation.",
    "DEP-607": "The server's certificate has expired or does not match.",
    "DEP-608": "A server without TLS is allowed on loopback only.",
    "DEP-609": "The server's port cannot be used.",
    "DEP-610": "The coordinator's server does not answer.",
    "DEP-611": "The coordinator's server refuses the credential.",
    "DEP-612": "The coordinator's server refuses the command.",
    "DEP-613": "No run was started with this kit.",
    "DEP-614": "A run is in progress.",
    "DEP-615": "The run ended without an outcome.",
    "DEP-616": "The private key of the certificate authority cannot be used.",
    "DEP-617": "The coordinator has not stated how many patients and slices a site can have.",
    # SITE: operation of a site, and unexpected failures, whose traceback stays there
    "SITE-500": "The site failed; the trace is in its own errors.log.",
    "SITE-502": "The memory of the site's device is too small.",
    "SITE-501": "The site's folder cannot be written or its ledger is broken; nothing leaves.",
    "SITE-503": "The work took longer than the site's deadline and was stopped.",
    "SITE-504": "The site's training process died.",
    "SITE-505": "The site is shutting down.",
    "SITE-506": "The site's link to the coordinator cannot be used.",
    "SITE-507": "The site's Flower node keeps stopping.",
    "SITE-508": "The site has already joined, or does not stop.",
    "SITE-509": "The coordinator does not admit this site.",
    "SITE-510": "The voxel size is missing, implausible, or far from the site's other cases.",
    "SITE-511": "The same image occurs twice.",
    "SITE-512": "Two patient ids may belong to one person.",
    "SITE-513": "The site has fewer patients or slices than its own floor.",
    "SITE-514": "The disk is too full.",
    "SITE-515": "The site's clock is wrong.",
    "SITE-516": "The coordinator's certificate expires soon.",
    "SITE-518": "A key or folder of the site has the wrong permissions.",
    "SITE-519": "Cases have no patient id.",
    "SITE-520": "The site's ledger contradicts what the coordinator confirmed; nothing leaves.",
    "SITE-521": "Another connection with this site's key was active until a moment ago.",
    # MON: metrics and dashboards
    "MON-901": "An optional package is not installed.",
    "MON-902": "The port of the metrics cannot be used.",
    "MON-903": "The Grafana server cannot be reached.",
    "MON-904": "Grafana does not accept the token.",
    "MON-905": "The token does not have the permission.",
    "MON-906": "The Grafana server is too old.",
    "MON-907": "Grafana answered with an error.",
    "MON-908": "The file with the token cannot be used.",
    "MON-910": "The file with the names of cases cannot be read.",
    "MON-911": "The report cannot be printed as PDF.",
    "MON-912": "An experiment tracker cannot write.",
    "MON-913": "An experiment tracker does not have all curves.",
    # PRV-95x, PRV-96x: secure sums
    "PRV-951": "The site demands a protection that the plan does not have.",
    "PRV-952": "The setting cannot be combined with secure sums.",
    "PRV-953": "The secure sum has too few sites; it is not opened.",
    "PRV-954": "The secure sum and earlier ones together would isolate too few sites.",
    "PRV-955": "A key of a secure sum is wrong or belongs to another sum.",
    "PRV-956": "A site or share does not belong to the secure sum.",
    "PRV-957": "A value is outside the range of the secure sum.",
    "PRV-958": "The sites do not agree whose numbers are summed, or about which reference.",
    "PRV-959": "A message of a secure sum is out of turn or repeated.",
    "PRV-960": "The opened sum is not possible.",
    "PRV-961": "The masks of a secure sum cannot be removed.",
    "PRV-962": "A partner's identity is not the one that this site knows.",
    "PRV-964": "No other hospital's projections are known: the batch's own are the negatives.",
    # PRV-97x: differential privacy
    "PRV-971": "The network's normalisation mixes patients, or cannot be checked.",
    "PRV-972": "A setting lets patients out without noise.",
    "PRV-973": "The delta is too large for the number of patients.",
    "PRV-974": "The privacy budget cannot pay for the run.",
    "PRV-975": "The site's privacy budget is spent.",
    "PRV-976": "The package for privacy accounting is not installed.",
    "PRV-977": "Central noise with so few hospitals is no protection, or no model.",
    "PRV-978": "The site demands differential privacy that the plan does not have.",
    "PRV-979": "Seeded noise protects nobody; the site refuses it.",
    "PRV-980": "The replies of a real hospital are not recorded for attacks.",
    "PRV-981": "The recorded replies of a run cannot be attacked.",
}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        code: Key of `CODES`.
        found: What was found.
        expected: What was expected.
        action: What the reader should do next.
        where: The file, setting, case or site concerned. May name a patient and is never sent.
    """

    code: str
    found: str = ""
    expected: str = ""
    action: str = ""
    where: str = ""

    def __post_init__(self) -> None:
        if self.code not in CODES:
            raise KeyError(f"unknown error code {self.code!r}")
        # A file name that is not valid UTF-8 must not break the console or the log.
        for field in fields(self):
            object.__setattr__(self, field.name, printable(getattr(self, field.name)))

    def __str__(self) -> str:
        lines = [f"[{self.code}] {CODES[self.code]}" + (f" ({self.where})" if self.where else "")]
        for label, text in (
            ("found", self.found),
            ("expected", self.expected),
            ("do", self.action),
        ):
            if text:
                lines.append(f"  {label}: {text}")
        return "\n".join(lines)


class FedsgcgError(Exception):
    """One or more problems that stop an operation."""

    def __init__(self, *problems: Problem) -> None:
        if not problems:
            raise ValueError("FedsgcgError needs at least one Problem")
        self.problems: tuple[Problem, ...] = problems
        super().__init__("\n".join(str(problem) for problem in problems))

    @property
    def code(self) -> str:
        """Code of the first problem."""
        return self.problems[0].code

    def public(self) -> str:
        """What may be sent: the code alone; the reader looks up its sentence in `CODES`."""
        return self.code

    def __reduce__(self) -> tuple[type[FedsgcgError], tuple[Problem, ...]]:
        # Without this an exception with several arguments cannot be unpickled by Ray.
        return (type(self), self.problems)


def fail(
    code: str, *, found: str = "", expected: str = "", action: str = "", where: str = ""
) -> FedsgcgError:
    """Build the error for one problem; the caller raises it."""
    return FedsgcgError(Problem(code, found, expected, action, where))
