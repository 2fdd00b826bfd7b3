"""A site's clock: how far it may be wrong, and what the check says."""

import pytest

from fedsgcg.deploy.site.check_link import _clock


@pytest.mark.parametrize(
    ("skew_s", "verdict"), [(0.5, "ok"), (-0.5, "ok"), (600.0, "fail"), (-600.0, "fail")]
)
def test_a_clock_that_is_ten_minutes_wrong_fails_the_check(skew_s: float, verdict: str) -> None:
    """Row 26: signed requests of such a site are rejected, and the check names the clock."""
    finding = _clock([skew_s, skew_s, 0.0])
    assert finding.verdict == verdict
    if verdict == "fail":
        side = "ahead of" if skew_s > 0 else "behind"
        assert finding.found == f"600 s {side} the coordinator's"
        assert "NTP" in finding.action
