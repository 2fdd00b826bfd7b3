"""Membership inference: was a patient, whose images the attacker has, used in the training?

Three observers, from weakest to strongest:

- `model`: whoever gets the selected model. Score: minus the patient's loss (Yeom et al., CSF 2018).
- `update`: the coordinator, from every model that a hospital sent. Score: how much the hospital's
  training lowered the patient's loss, summed over the rounds. The model before the round is the
  reference for how hard the patient is (difficulty calibration, Watson et al., ICLR 2022). With
  secure sums it has the steps of the merged model, in place of each hospital's.
- `statistics`: the coordinator, from the class statistics of a hospital. Score: the inner product
  of the patient's own statistics and the sent ones, about the mean of the patients that were kept
  out (Homer et al., PLoS Genetics 2008; Dwork et al., FOCS 2015), summed over the rounds.

Scores are compared within a hospital and then pooled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fedsgcg.common.settings.plan import Plan
from fedsgcg.common.statistics import ClassStatistics
from fedsgcg.common.wire.messages import TRAIN
from fedsgcg.common.wire.payload import Weights
from fedsgcg.deploy.attacks.patients import Patient, losses, network_of, statistics_of
from fedsgcg.deploy.attacks.scores import Array, Separation, separation, standardised
from fedsgcg.server.records.received import Received

MOST_ROUNDS = 4
"""Most rounds of each hospital that are attacked, spread over the run."""


def attack_model(plan: Plan, model: Weights, patients: Sequence[Patient]) -> Separation | None:
    """Attack the selected model."""
    return _pooled(patients, -losses(network_of(plan, model), patients, plan))


def attack_updates(
    plan: Plan, received: Sequence[Received], patients: Sequence[Patient], model: Weights
) -> Separation | None:
    """Attack the sent models; with secure sums the merged ones, of which `model` is the last."""
    if plan.privacy.secure_sums.enabled:
        received = merged_steps(received, model)
    scores = np.zeros(len(patients))
    for site, places in _by_site(patients).items():
        for reply in _spread([each for each in received if each.site == site and each.weights]):
            if reply.weights is None:
                continue
            own = [patients[place] for place in places]
            before = losses(network_of(plan, reply.sent), own, plan)
            scores[places] += before - losses(network_of(plan, reply.weights), own, plan)
    return _pooled(patients, scores)


def attack_statistics(
    plan: Plan, received: Sequence[Received], patients: Sequence[Patient]
) -> Separation | None:
    """Attack the class statistics that the hospitals sent; None if they sent none."""
    scores, any_sent = np.zeros(len(patients)), False
    for site, places in _by_site(patients).items():
        replies = [each for each in received if each.site == site and each.statistics is not None]
        for reply in _spread(replies):
            if reply.statistics is None:
                continue
            any_sent = True
            network = network_of(plan, reply.sent)
            own = np.stack(
                [as_vector(statistics_of(network, patients[place], plan)) for place in places]
            )
            outside = np.array([not patients[place].member for place in places])
            scores[places] += inner_products(own, outside, as_vector(reply.statistics))
    return _pooled(patients, scores) if any_sent else None


def merged_steps(received: Sequence[Received], model: Weights) -> list[Received]:
    """Return what each site is known to have contributed to: the step from each model to the next.

    Args:
        received: Replies without weights, in their order.
        model: The final model.
    """
    trained = [each for each in received if each.kind == TRAIN]
    sent = {each.round: each.sent for each in trained}
    rounds = sorted(sent)
    after = dict(zip(rounds, [sent[number] for number in rounds[1:]] + [model], strict=True))
    return [replace(each, weights=after[each.round]) for each in trained]


def as_vector(statistics: ClassStatistics) -> Array:
    """Return means and mean products of the classes as one vector; NaN for an absent class."""
    products = statistics.covariance + (statistics.mean[:, :, None] * statistics.mean[:, None, :])
    rows = np.concatenate([statistics.mean, products.reshape(len(statistics.count), -1)], axis=1)
    return np.where(statistics.count[:, None] > 0, rows, np.nan).reshape(-1)


def inner_products(own: Array, outside: np.ndarray, sent: Array) -> Array:
    """Return (P,) inner products of the patients' vectors and the sent one about a reference.

    Args:
        own: (P, D) vectors of the patients.
        outside: (P,) whether a patient was kept out; the reference of each patient is the mean of
            these without the patient itself.
        sent: (D,) the sent vector.
    """
    scores = np.zeros(len(own))
    for place in range(len(own)):
        others = outside.copy()
        others[place] = False
        if not others.any():
            continue
        with np.errstate(invalid="ignore"):
            reference = own[others].mean(axis=0)
            terms = (own[place] - reference) * (sent - reference)
        scores[place] = np.nansum(terms)
    return scores


def _by_site(patients: Sequence[Patient]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for place, patient in enumerate(patients):
        found.setdefault(patient.site, []).append(place)
    return found


def _spread(replies: Sequence[Received]) -> list[Received]:
    if not replies:
        return []
    chosen = np.unique(np.linspace(0, len(replies) - 1, MOST_ROUNDS, dtype=int))
    return [replies[int(place)] for place in chosen]


def _pooled(patients: Sequence[Patient], scores: Array) -> Separation | None:
    """Pool the scores of all hospitals; None without members or without others."""
    comparable = np.zeros(len(scores))
    for places in _by_site(patients).values():
        comparable[places] = standardised(scores[places])
    member = np.array([each.member for each in patients])
    if not member.any() or member.all():
        return None
    return separation(comparable[member], comparable[~member])
