"""`fedsgcg data check FOLDER`: read every case of all hospitals before a study, with a sheet.

In a simulation one machine reads the data of all hospitals. In a real federation each hospital
checks its own data with `fedsgcg-site check`, which uses the same checks of files, device and disk.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path

from rich.table import Table

from fedsgcg.common.console import Screen, steps_of
from fedsgcg.common.errors import FedsgcgError, fail
from fedsgcg.common.files import atomic
from fedsgcg.common.files.errors import disk_advice
from fedsgcg.common.images.folders import NAMED
from fedsgcg.common.names import number_of, printable
from fedsgcg.common.settings.plan import Plan
from fedsgcg.deploy.cli.check_command import SHEET
from fedsgcg.deploy.cli.sheet import Sheet
from fedsgcg.deploy.prepare.command import SETTINGS
from fedsgcg.deploy.site.check import examine_disk, exit_code, measure_device, show
from fedsgcg.deploy.site.check_files import Seen, examine_cases, grey_and_colour
from fedsgcg.deploy.site.findings import Finding, Verdict
from fedsgcg.server.report.format import show_seconds


def run_check(options: argparse.Namespace, console: Screen) -> int:
    """Check a data folder; returns 0, 1 for errors or 3 for warnings."""
    plan = plan_of(options.source, options.overrides)
    sheet = Sheet(plan.data)
    target: Path = options.output or Path(plan.data.root) / SHEET
    with _writing(target):  # a folder that is read-only is found before minutes of reading
        tempfile.TemporaryFile(dir=target.parent).close()
    findings, seen = examine(plan, sheet, console)
    tables = [_hospitals(seen), _labels(seen, plan)]
    for finding in findings:
        facts = finding.as_dict()
        console.event("data.finding", what=facts.pop("name"), **facts)
    for title, rows in tables:
        console.print(_table(title, rows))
    show(findings, console, everything=options.all, title="fedsgcg data check")
    code = exit_code(findings)
    with _writing(target):
        atomic.write_file(target, sheet.page(findings, tables, plan.data.name), mode=0o600)
    console.print(f"sheet: {target} (shows patients)")
    cases = {site: len(found) for site, found in seen.items()}
    console.event("data.checked", exit_code=code, sheet=target, cases=cases)
    return code


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Turn an error of the file system into DAT-173."""
    try:
        yield
    except OSError as error:
        action = disk_advice(error, "name a file in a writable folder with -o FILE.")
        raise fail(
            "DAT-173",
            where=str(target),
            found=str(error),
            expected="a writable file",
            action=action,
        ) from error


def plan_of(source: Path, overrides: Sequence[str]) -> Plan:
    """Return the plan of a data folder or of its settings file.

    Raises:
        FedsgcgError: DAT-170 for a folder without settings when none are given, DAT-101 for a
            folder that cannot be used, CFG-001 for invalid settings.
    """
    from fedsgcg.common.settings.compose import compose
    from fedsgcg.deploy.study.preflight import locate_hospitals

    given = list(overrides)
    settings = source / SETTINGS if source.is_dir() else source
    if source.is_dir():
        given.append(f"data.root={source.resolve()}")
    if not any(text.startswith("data=") for text in given):
        if not settings.is_file():
            action = f"Run `fedsgcg data prepare` first, or add data=NAME or data=PATH/{SETTINGS}."
            raise fail(
                "DAT-170",
                where=str(source),
                found=f"no {settings.name}",
                expected=SETTINGS,
                action=action,
            )
        given.insert(0, f"data={settings.resolve()}")
    return Plan.from_tree(locate_hospitals(compose([*given, "output=."])))


def examine(
    plan: Plan, sheet: Sheet, console: Screen
) -> tuple[list[Finding], dict[str, list[Seen]]]:
    """Check all hospitals: each alone, then all together, then device and disk.

    Args:
        plan: The data and the size of a training step.
        sheet: Collects a slice of each case (`deploy.cli.sheet.Sheet`).
        console: Console for progress.

    Returns:
        The findings, whose names start with the hospital, and hospital -> its readable cases.
    """
    from fedsgcg.clients.data.case_files import data_warnings, open_site, splits, unvalidated

    root = Path(plan.data.root)
    findings: list[Finding] = []
    seen: dict[str, list[Seen]] = {}
    with steps_of(console, "checking the data") as step:
        for name in plan.data.sites:
            step(f"files of {name}")
            try:
                site = open_site(root, name, plan.data, masks=name not in plan.unlabelled)
            except FedsgcgError as error:
                findings += [Finding.of("files", problem) for problem in error.problems]
                continue
            target = name in plan.unlabelled
            fraction = plan.data.validation_fraction
            rule = plan.data.split
            parts = splits(site.cases, fraction, heldout=False, target=target, rule=rule)
            found, seen[name] = examine_cases(
                site,
                parts,
                plan.data,
                masks=not target,
                progress=partial(_case, step, name),
                look=partial(sheet.add, count=len(site.cases)),
            )
            findings += [_named(finding, name) for finding in found]
            findings += _unnamed_patients(name, seen[name])
            patients = [case.patient for case in site.cases]
            bare = unvalidated(name, parts, patients, fraction)
            if not target:  # a hospital without labels is not meant to validate
                findings += [Finding.of("files", problem, "note") for problem in bare]
        known = {(finding.code, finding.found) for finding in findings}
        findings += [
            Finding.of("files", problem, "warn")
            for problem in data_warnings(root, plan.data.sites)
            if (problem.code, Finding.of("files", problem).found) not in known
        ]
        findings += [*_shared_images(seen), *_shared_patients(seen)]
        findings += [*_absent_classes(seen, plan), *_axes(seen)]
        if not any(finding.code == "DAT-192" for finding in findings):
            findings += grey_and_colour(seen)
        step("one training step")
        device, seconds = measure_device(plan.site.device, plan.site.threads, plan)
        findings += [*device, *_duration(seen, plan, seconds)]
    everything = [one for found in seen.values() for one in found]
    findings += examine_disk((str(plan.site.cache),), everything)
    return findings, seen


def _case(step: Callable[[str], None], site: str, done: int, of: int) -> None:
    step(f"{site}, case {done} of {of}")


def _named(finding: Finding, site: str) -> Finding:
    return replace(finding, name=f"{site} {finding.name}".removesuffix(f" {site}"))


def _shared_images(seen: Mapping[str, Sequence[Seen]]) -> Iterator[Finding]:
    """Yield images that two hospitals have: a held-out hospital would not be unseen."""
    first: dict[str, tuple[str, str]] = {}
    for site, cases in seen.items():
        for one in cases:
            owner, case = first.setdefault(one.content, (site, one.case.name))
            if owner != site:
                found = f"the same pixels as {owner} {case}"
                action = "Remove one of the two; otherwise a held-out hospital is not unseen."
                yield Finding("files", f"{site} {one.case.name}", "fail", found, action, "DAT-171")


def _shared_patients(seen: Mapping[str, Sequence[Seen]]) -> Iterator[Finding]:
    """Yield pairs of hospitals that name the same patients.

    Ids of digits alone may count the patients of each hospital, and are only a note.
    """
    ids = {
        site: {one.case.patient for one in cases if one.case.has_patient}
        for site, cases in seen.items()
    }
    for first, second in combinations(ids, 2):
        if not (shared := sorted(ids[first] & ids[second])):
            continue
        names = ", ".join(map(printable, shared[:NAMED])) + (", ..." if shared[NAMED:] else "")
        found = f"{number_of(len(shared), 'patient id')} also at {first}: {names}"
        action = (
            "If they are the same persons, list them at one hospital only: otherwise a held-out "
            "hospital is not unseen. If each hospital counts its own patients, this is right."
        )
        verdict: Verdict = "note" if all(one.isdigit() for one in shared) else "warn"
        yield Finding("files", second, verdict, found, action, "DAT-191")


def _unnamed_patients(site: str, seen: Sequence[Seen]) -> Iterator[Finding]:
    """Yield the cases without a patient's id: a note if no case has one, else a warning."""
    missing = [one.case.name for one in seen if not one.case.has_patient]
    if not missing:
        return
    names = ", ".join(map(printable, missing[:NAMED])) + (", ..." if missing[NAMED:] else "")
    found = (
        f"{len(missing)} of {number_of(len(seen), 'case')} without a patient_id, each counts as "
        f"one patient: {names}"
    )
    action = (
        "If a person has several cases, write patient_id in manifest.csv: otherwise that person "
        "may be in training and validation."
    )
    verdict: Verdict = "note" if len(missing) == len(seen) else "warn"
    yield Finding("files", site, verdict, found, action, "SITE-519")


def _absent_classes(seen: Mapping[str, Sequence[Seen]], plan: Plan) -> Iterator[Finding]:
    """Yield declared classes that occur in no mask of a hospital, or of all hospitals."""
    counts = class_pixels(seen, plan)
    for index, name in enumerate(plan.data.classes):
        without = [
            site for site in counts if site not in plan.unlabelled and not counts[site][index]
        ]
        labelled = [site for site in counts if site not in plan.unlabelled]
        if not without:
            continue
        found = f"no pixel of class {name} {plan.data.classes[name]} at {', '.join(without)}"
        if without == labelled:
            action = "Correct the values of the class in data.classes, or remove the class."
            yield Finding("files", name, "fail", found, action, "DAT-172")
        else:
            action = "If the hospital draws the structure with another value, declare it as well."
            yield Finding("files", name, "warn", found, action, "DAT-172")


def _axes(seen: Mapping[str, Sequence[Seen]]) -> Iterator[Finding]:
    """Yield one warning if hospitals were acquired along different axes, or have pictures."""
    kinds = {
        site: Counter(one.kind for one in cases).most_common(1)[0][0]
        for site, cases in seen.items()
        if cases
    }
    if len(set(kinds.values())) > 1:
        found = ", ".join(f"{site} {kind}" for site, kind in kinds.items())
        action = "Slices of different planes differ in shape; use hospitals of one plane together."
        yield Finding("files", "acquisition", "warn", found, action, "DAT-117")


def class_pixels(seen: Mapping[str, Sequence[Seen]], plan: Plan) -> dict[str, list[int]]:
    """Return hospital -> pixels of each class, for hospitals with a readable case."""
    return {
        site: [sum(one.pixels[k] for one in cases) for k in range(plan.data.num_classes)]
        for site, cases in seen.items()
        if cases
    }


def _duration(
    seen: Mapping[str, Sequence[Seen]], plan: Plan, seconds: float | None
) -> Iterator[Finding]:
    """Yield the time of a model's training steps at the hospital with most training slices."""
    slices = [sum(one.slices for one in cases if one.split == "train") for cases in seen.values()]
    if not slices or seconds is None:
        return
    epoch = max(1, -(-max(slices) // plan.method.batch_size))
    steps = plan.method.steps_per_round or plan.method.local_epochs * epoch
    together = show_seconds(max(seconds * steps * plan.federation.rounds, 1.0))
    found = (
        f"{number_of(steps, 'step')} a round at the largest hospital, "
        f"{number_of(plan.federation.rounds, 'round')}: about "
        f"{together} of steps a model if the hospitals train in parallel"
    )
    yield Finding("device", "training", "note", found)


Rows = list[list[str]]
"""Lines of a table; the first has the titles."""


def _hospitals(seen: Mapping[str, Sequence[Seen]]) -> tuple[str, Rows]:
    """Return a line for each hospital: cases, patients, splits, sizes, spacings, axes."""
    rows: Rows = [["hospital", "cases", "patients", "splits", "sizes", "spacing (mm)", "axes"]]
    for site, cases in seen.items():
        splits = Counter(one.split for one in cases)
        rows.append(
            [
                site,
                str(len(cases)),
                str(len({one.case.patient for one in cases})),
                ", ".join(f"{name} {count}" for name, count in sorted(splits.items())),
                _most(["x".join(map(str, one.shape)) for one in cases]),
                _most(
                    [
                        "x".join(f"{side:.3g}" for side in one.spacing) if one.spacing else "none"
                        for one in cases
                    ]
                ),
                _most([f"{one.kind} {one.axes}".strip() for one in cases]),
            ]
        )
    return "Hospitals", rows


def _most(texts: Sequence[str], shown: int = 3) -> str:
    counts = Counter(texts)
    parts = [f"{text} ({count})" for text, count in counts.most_common(shown)]
    more = len(counts) - shown
    return ", ".join(parts) + (f", {more} more" if more > 0 else "")


def _labels(seen: Mapping[str, Sequence[Seen]], plan: Plan) -> tuple[str, Rows]:
    """Return a line for each hospital: share of pixels and number of cases with each class."""
    rows: Rows = [["hospital", *plan.data.classes, "without a structure"]]
    for site, counts in class_pixels(seen, plan).items():
        total = max(1, sum(counts))
        having = [sum(one.pixels[k] > 0 for one in seen[site]) for k in range(len(counts))]
        cells = [f"{100 * n / total:.2f} % in {h}" for n, h in zip(counts, having, strict=True)]
        rows.append([site, *cells, str(sum(one.empty for one in seen[site]))])
    return "Share of pixels, and cases with the class", rows


def _table(title: str, rows: Rows) -> Table:
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name, overflow="fold")
    for row in rows[1:]:
        table.add_row(*row)
    return table
