"""Words and numbers of the report: one-sentence result, status, protocol, notes. Plain text; the page escapes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import yaml

from server.report.differences import Difference
from server.report.intervals import Interval
from server.report.rounds import cut_steps
from server.report.sections.cases import case_lines, count_of, join_words, left_out_sentence
from server.report.study_files import DONE, Cell, StudyFiles
from server.report.tables import AVERAGE, Row, methods_of

Summary = Mapping[str, Any]
DASH = "–"
DECIMALS = {"dice": 3, "asd": 2, "assd": 2, "hd95": 2, "hd95_max": 2}
TITLES = {"dice": "Dice", "asd": "ASD", "assd": "ASSD", "hd95": "HD95", "hd95_max": "HD95, larger side"}
FEW_CASES = 8  # below, an interval of skewed values is somewhat too narrow
NAMED_HOSPITALS = 8  # of a sentence; with more it says how many
STATUS_WORDS = {
    "completed": "Complete",
    "degraded": "Complete, with degraded runs",
    "incomplete": "Not complete",
    "failed": "Failed",
}


def show(value: float, decimals: int, *, sign: bool = False) -> str:
    """Write a number with a real minus sign; a dash for one that is not known."""
    if not math.isfinite(value):
        return DASH
    rounded = round(value, decimals) + 0.0  # no minus before a zero
    return f"{rounded:{'+' if sign else ''}.{decimals}f}".replace("-", "−")


def show_interval(interval: Interval, decimals: int, *, sign: bool = False) -> str:
    """Write "low to high", or a dash when it is not known."""
    if not math.isfinite(interval.low):
        return DASH
    return f"{show(interval.low, decimals, sign=sign)} to {show(interval.high, decimals, sign=sign)}"


def show_p(p: float) -> str:
    """Write a p value: two digits, "under 0.001" for the smallest, a dash for one that is not known."""
    if not math.isfinite(p):
        return DASH
    return "<\u00a00.001" if p < 0.001 else f"{p:.3f}" if p < 0.0995 else f"{p:.2f}"


def show_ends(interval: Interval, decimals: int) -> str:
    """Write "low to high" with signs, and with more digits where an end would look like zero and is not."""
    ends = [interval.low, interval.high]
    hidden = [end for end in ends if end != 0 and abs(end) < 0.5 * 10**-decimals]
    return show_interval(interval, decimals + 1 if hidden else decimals, sign=True)


def show_bytes(size: float) -> str:
    """Write a number of bytes in the unit that suits it (1 kB = 1000 B)."""
    if not math.isfinite(size):
        return DASH
    for unit in ("B", "kB", "MB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} GB" if size < 1000 else f"{size:,.0f} GB"


def show_seconds(seconds: float) -> str:
    """Write a duration as a person would say it."""
    if not math.isfinite(seconds):
        return DASH
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def focus_method(methods: Sequence[str]) -> str:
    """The label that the study is about: RAM with SgCG, or SgCG, where they take part, else the last one."""
    for trains in ("ram_sgcg", "sgcg"):
        if found := [name for name in methods if name.split()[0] == trains]:
            return found[0]
    return methods[-1] if methods else ""


def headline(summary: Sequence[Summary], differences: Sequence[Difference], structure: str, hospitals: int = 0) -> str:
    """Say the main result in one or two sentences: Dice of the main structure at hospitals that took no part.

    Args:
        summary: Rows of `summary_rows`.
        differences: The study's main comparisons, most telling first.
        structure: The main structure.
        hospitals: Held-out hospitals that the study asked for; an average over fewer says so.
    """
    rows = [row for row in summary if row["structure"] == structure]
    methods = methods_of(rows)
    if not rows:
        return "No held-out hospital has been evaluated yet."
    focus = focus_method(methods)
    site = AVERAGE if any(row["site"] == AVERAGE and row["method"] == focus for row in rows) else rows[0]["site"]
    chosen = {row["method"]: row for row in rows if row["site"] == site}
    if focus not in chosen:
        focus = next(iter(chosen))
    if len(chosen) > 1 and not any(entry["heldout"] not in ("", AVERAGE) for entry in rows):
        return _best_of(list(chosen.values()), structure)
    row = chosen[focus]
    among = f"{row['hospitals']} of {hospitals}" if row["hospitals"] < hospitals else row["hospitals"]
    place = f"On average over {among} hospitals" if site == AVERAGE else f"At {site}, a hospital"
    place += " that took no part in training"
    if not any(row["heldout"] not in ("", AVERAGE) for row in rows):
        place = "No hospital was held out. On the hospitals' own validation cases"
    spread = show_interval(Interval(row["dice_mean"], row["dice_low"], row["dice_high"]), 3)
    text = f"{place}, {focus} reaches a mean Dice of {show(row['dice_mean'], 3)}"
    text += f" (95 % interval {spread})" if spread != DASH else ""
    text += f" for {structure}."
    pairs = [d for d in differences if d.structure == structure and d.metric == "dice" and d.method == focus]
    pair = next((d for d in pairs if d.site == site and d.cases), None)
    return f"{text} {_compared(pair)}" if pair is not None else text


def _best_of(rows: Sequence[Summary], structure: str) -> str:
    """Where nobody was held out a setting may be chosen: the two highest of all that are compared."""
    first, second, *_ = sorted(rows, key=lambda row: -float(row["dice_mean"]))
    text = "No hospital was held out. On the hospitals' own validation cases, "
    text += f"{first['method']} has the highest mean Dice of the {len(rows)} compared: {show(first['dice_mean'], 3)}"
    interval = show_interval(Interval(first["dice_mean"], first["dice_low"], first["dice_high"]), 3)
    text += f" (95 % interval {interval})" if interval != DASH else ""
    text += f" for {structure}; next is {second['method']} with {show(second['dice_mean'], 3)}."
    return (
        f"{text} A setting chosen by this was chosen with patients of all these hospitals, also of one held out later."
    )


def _compared(pair: Difference) -> str:
    start = f"That is {show(pair.interval.mean, 3, sign=True)} against {pair.reference} on the same cases"
    interval = show_ends(pair.interval, 3)
    if interval == DASH:
        return f"{start}; one case allows no interval."
    facts = "; ".join([f"95 % interval {interval}", f"corrected p\u00a0{show_p(pair.p)}", *directions(pair)])
    if pair.holds:
        return f"{start} ({facts}): the difference holds."
    return f"{start} ({facts}): {pair.sentence}."


def directions(entry: Difference) -> list[str]:
    """Where an average points: "higher at 1 of 4 hospitals: A +0.297, B −0.006"; nothing at a single hospital."""
    sign, word = (1, "higher") if entry.metric == "dice" else (-1, "lower")
    found = sorted(entry.by_hospital.items(), key=lambda item: -sign * item[1])
    if entry.site != AVERAGE or len(found) < 2:
        return []
    text = f"{word} at {sum(sign * value > 0 for _, value in found)} of {len(found)} hospitals"
    if len(found) <= NAMED_HOSPITALS:
        text += f": {', '.join(f'{site} {show(value, DECIMALS[entry.metric], sign=True)}' for site, value in found)}"
    return [text]


def status_sentence(study: StudyFiles) -> str:
    """Say how many of the runs ended, and how, and whether hospitals left cases out."""
    left_out = left_out_sentence([cell.outcome for cell in study.cells])
    return " ".join(filter(None, (_how_runs_ended(study), left_out)))


def _how_runs_ended(study: StudyFiles) -> str:
    done = sum(cell.status in DONE for cell in study.cells)
    text = f"{done} of {count_of(len(study.cells), 'run')} ended"
    if study.status == "completed":
        return f"All {len(study.cells)} runs ended as planned." if done > 1 else "The run ended as planned."
    if study.status == "degraded":
        return f"{text}, but some of them without every hospital in every round. Their results are shown and marked."
    if study.status == "failed":
        return f"{text}. There is no result to rely on."
    return (
        f"{text}. Tables and figures show what is there; gaps are marked. The same command runs only what is missing."
    )


def troubled(cells: Iterable[Cell]) -> list[dict[str, str]]:
    """Cells that did not complete, for the banner: what, status, reason."""
    return [
        {"label": cell.label, "status": cell.status, "reason": cell.reason}
        for cell in cells
        if cell.status != "completed"
    ]


def protocol_box(study: StudyFiles) -> list[tuple[str, list[str]]]:
    """Return the protocol as (topic, lines): who trained, who judged, by which rules, on what machine."""
    words = _protocols(study)
    tree = next(iter(study.settings.values()), {})
    topics = [
        ("Who was held out", _folds(study)),
        ("Cases", case_lines([cell.outcome for cell in study.cells])),
        ("Images", _all_of(words, "images")),
        ("Splits", _all_of(words, "splits")),
        ("Choice of the model", _selection(words)),
        ("Choice of settings", _settings_choice(study)),
        ("Training", _training(study)),
        ("Memory", [text] if (text := cut_steps(study.rounds)) else []),
        ("Evaluation", _all_of(words, "evaluated")),
        ("Decision", _all_of(words, "decision")),
        ("Post-processing", _post_processing(words)),
        ("Structures", _structures(tree)),
        ("Metrics", _metrics(words)),
        ("Unit of distance", _all_of(words, "distance_unit")),
        ("Machine", _machine(study)),
    ]
    return [(topic, lines) for topic, lines in topics if lines]


def _protocols(study: StudyFiles) -> list[Mapping[str, Any]]:
    found = [cell.model.get("protocol") for cell in study.cells]
    return [entry for entry in found if isinstance(entry, dict)]


def _all_of(protocols: Iterable[Mapping[str, Any]], name: str) -> list[str]:
    """Every different statement of the cells about `name`, in order."""
    return list(dict.fromkeys(str(entry[name]) for entry in protocols if entry.get(name) not in (None, "")))


def _post_processing(protocols: Iterable[Mapping[str, Any]]) -> list[str]:
    """What is done to the mask of each structure; structures that are treated alike share a line."""
    steps: dict[str, dict[str, None]] = {}
    for entry in protocols:
        stated = entry.get("post_processing")
        for name, text in stated.items() if isinstance(stated, Mapping) else ():
            steps.setdefault(str(text), {})[str(name)] = None
    return [f"{join_words(list(names))}: {text}" for text, names in steps.items()]


def _folds(study: StudyFiles) -> list[str]:
    together = [cell.model.get("protocol") for cell in study.cells if not cell.trained_on]
    entries = [entry for entry in together if isinstance(entry, dict)]
    entries.sort(key=lambda entry: len(entry.get("trained", [])))  # who shared a place stands there as one
    trained = {str(entry.get("heldout", "")): join_words(entry.get("trained", [])) or "nobody" for entry in entries}
    alone: dict[str, set[str]] = {}
    for cell in study.cells:
        if cell.trained_on and cell.model:
            alone.setdefault(cell.heldout, set()).add(cell.trained_on)
    for heldout, names in alone.items():
        trained.setdefault(heldout, f"{join_words(sorted(names))}{', each' if len(names) > 1 else ''} alone")
    lines = []
    for heldout in sorted({cell.heldout for cell in study.cells}):
        who = f"{heldout} held out" if heldout else "no hospital held out"
        lines.append(f"{who}: {trained[heldout]} trained" if heldout in trained else f"{who}: not run to its end")
    observers = sorted({str(name) for entry in _protocols(study) for name in entry.get("observers", [])})
    return lines + ([f"only evaluated, never trained: {join_words(observers)}"] if observers else [])


def _selection(protocols: Sequence[Mapping[str, Any]]) -> list[str]:
    rounds = sorted(
        {int(entry["selected_round"]) for entry in protocols if isinstance(entry.get("selected_round"), int)}
    )
    words = [f"{text}; the held-out hospital never chooses a model" for text in _all_of(protocols, "selection")]
    few = f"round{'' if len(rounds) == 1 else 's'} {join_words(rounds)}"
    span = few if len(rounds) <= 3 else f"rounds {rounds[0]} to {rounds[-1]}"
    return words + ([f"evaluated: the model of {span}"] if rounds and words else [])


def _selection_of(study: StudyFiles) -> Mapping[str, Any]:
    """What `study.yaml` records of how settings were chosen: `words`, and what each fold chose (`chosen`)."""
    found = study.tree.get("selection")
    return found if isinstance(found, Mapping) else {}


def chosen_within_folds(study: StudyFiles) -> bool:
    """Whether each fold chose its settings by its own source hospitals (nested selection, `select` of a study)."""
    return bool(_selection_of(study).get("chosen"))


def _settings_choice(study: StudyFiles) -> list[str]:
    """Whose patients had a say in the settings of runs that hold a hospital out, and what each fold chose."""
    if not any(cell.heldout for cell in study.cells):
        return []
    selection = _selection_of(study)
    lines = [str(selection["words"])] if selection.get("words") else []
    for entry in selection.get("chosen") or []:
        scores = ", ".join(f"{name} {show(float(score), 3)}" for name, score in entry["scores"].items())
        fold = f"{entry['heldout'] or 'nobody'} held out, seed {entry['seed']}"
        lines.append(f"{entry['method']}, {fold}: {entry['settings']} (mean Dice at the sources left out: {scores})")
    if not selection:  # a study from before this was recorded
        lines.append(
            "the same in every fold; a setting that was chosen with validation cases of these hospitals (as the "
            "shipped weight and temperature of SgCG were) was chosen with patients of hospitals that are held out here"
        )
    return lines


def _mixing(study: StudyFiles) -> list[str]:
    """How amplitude mixing differs from the published method, where hospitals keep their images to themselves."""
    alone = [
        label
        for label, tree in study.settings.items()
        if str(_part(tree, "method").get("name", "")).startswith("ram")
        and _part(_part(tree, "method"), "ram").get("sharing") == "local"
        and _part(tree, "federation").get("ownership", "by_site") != "pooled"
    ]
    if not alone:
        return []
    return [
        f"{join_words(alone)}: an image is mixed with the hospital’s own images only (method.ram.sharing=local); the "
        "published method mixes across domains"
    ]


def _training(study: StudyFiles) -> list[str]:
    def either(section: str, *names: str, say: Callable[..., str] = str) -> str:
        """What the methods' settings say, each different word once: "6 or 24"."""
        parts = [_part(tree, section) for tree in study.settings.values()]
        return " or ".join(dict.fromkeys(say(*(part.get(name) for name in names)) for part in parts if part))

    def amount(steps: int | None, epochs: int | None) -> str:
        return count_of(steps, "step") if steps else count_of(1 if epochs is None else epochs, "local epoch")

    seeds = sorted({cell.seed for cell in study.cells})
    lines = [f"methods {join_words(methods_of([{'method': cell.method} for cell in study.cells]))}"]
    lines.append(f"{'seed' if len(seeds) == 1 else 'seeds'} {join_words(seeds)}")
    if rounds := either("federation", "rounds"):
        lines.append(f"{rounds} rounds, hospitals weighted by {either('federation', 'weighting')}")
    if name := either("network", "name"):
        width, norm = either("network", "base_width"), either("network", "norm")
        lines.append(f"{name}, base width {width}, {norm} normalisation")
    if length := either("method", "steps_per_round", "local_epochs", say=amount):
        batch, rate = either("method", "batch_size"), either("method", "learning_rate")
        lines.append(f"{length} a round, batch {batch}, learning rate {rate}")
    return lines + _mixing(study)


def _structures(tree: Mapping[str, Any]) -> list[str]:
    parts = _part(_part(tree, "data"), "structures")
    named = {str(name): [str(part) for part in classes] for name, classes in parts.items() if isinstance(classes, list)}
    return [name if classes == [name] else f"{name} = {' + '.join(classes)}" for name, classes in named.items()]


def _metrics(protocols: Sequence[Mapping[str, Any]]) -> list[str]:
    found: Mapping[str, Any] = next(
        (entry["metrics"] for entry in protocols if isinstance(entry.get("metrics"), dict)), {}
    )
    return [f"{TITLES[name]}: {text}" if name in TITLES else str(text) for name, text in found.items()]


def _machine(study: StudyFiles) -> list[str]:
    tree = study.tree
    lines = [str(tree[name]) for name in ("machine",) if tree.get(name)]
    how = ", ".join(f"{name} {tree[name]}" for name in ("runtime", "device") if tree.get(name))
    seconds = sum(cell.seconds for cell in study.cells if math.isfinite(cell.seconds))
    lines += [how] if how else []
    return lines + ([f"{show_seconds(seconds)} of run time over all runs"] if seconds else [])


def _part(tree: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = tree.get(name)
    return part if isinstance(part, dict) else {}


def result_notes(summary: Sequence[Summary], rows: Sequence[Row], hospitals: int) -> list[str]:
    """Cautions that a reader of the result table must have, only those that apply."""
    single = [row for row in summary if row["site"] != AVERAGE]
    notes = []
    few = sorted({row["site"] for row in single if row["cases"] < FEW_CASES})
    if few:
        notes.append(
            f"Few cases at {join_words(few)} (under {FEW_CASES}): where some cases fail and others do not, such an "
            "interval is somewhat too narrow."
        )
    seeds = {seed for row in single for seed in row["seeds"]}
    if len(seeds) == 1:
        notes.append("One seed: nothing here tells how much the result changes when training is repeated.")
    short = sorted({row["site"] for row in single if len(row["seeds"]) < len(seeds)})
    if short:
        notes.append(f"Some seeds are missing at {join_words(short)}; the table says how many each number has.")
    if any(row["site"] == AVERAGE and row["hospitals"] < hospitals for row in summary):
        notes.append(f"An average over fewer than {hospitals} hospitals is marked, and no average is called best.")
    undefined = sum(int(row["asd_excluded"]) for row in single)
    if undefined:
        notes.append(
            f"In {count_of(undefined, 'evaluation')} one mask is empty: no surface distance, left out of its mean. The "
            "tables say where: “mean over 3 of 4”."
        )
    both = sum(bool(row.get("empty_prediction") and row.get("empty_truth")) for row in rows)
    if both:
        notes.append(
            f"In {count_of(both, 'evaluation')} truth and prediction are both empty: counted as Dice 1, distance 0."
        )
    return notes


def settings_text(settings: Mapping[str, Mapping[str, Any]]) -> tuple[str, list[tuple[str, list[str]]]]:
    """Return (YAML of what all methods share, [(setting, value of each method)] of what differs)."""
    flat = {method: dict(_flatten(tree)) for method, tree in settings.items()}
    names = list(dict.fromkeys(name for tree in flat.values() for name in tree))
    shared: dict[str, Any] = {}
    differing = []
    for name in names:
        values = [tree.get(name, DASH) for tree in flat.values()]
        if all(value == values[0] for value in values):
            shared[name] = values[0]
        else:
            differing.append((name, [str(value) for value in values]))
    return yaml.safe_dump(shared, sort_keys=False, allow_unicode=True) if shared else "", differing


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
