"""What the dashboards' queries are made of: rates, means, quantiles and shares in Prometheus' language."""

from __future__ import annotations

RATE = "[$__rate_interval]"
APP = 'application=~"$application"'

#: Ray's agent takes the middle of its bucket for every value, and a quantile is a guess within its bucket.
APPROXIMATE = "Approximate, by buckets"


def rate(metric: str, by: str, matchers: str = "") -> str:
    """What a counter grows by in a second, for each value of the labels in ``by``."""
    chosen = ", ".join(filter(None, (APP, matchers)))
    return f"sum by ({by}) (rate({metric}{{{chosen}}}{RATE}))"


def quantile(share: float, metric: str, by: str = "", matchers: str = "") -> str:
    """What ``share`` of a histogram's values lie below."""
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({share}, {rate(f'{metric}_bucket', labels, matchers)})"


def mean(metric: str, by: str) -> str:
    """Of a histogram's latest values."""
    return f"{rate(f'{metric}_sum', by)} / {rate(f'{metric}_count', by)}"


def rate_or_0(metric: str, by: str, matchers: str) -> str:
    """:func:`rate` of what may not have happened yet: 0 then, and not nothing."""
    return f"{rate(metric, by, matchers)} or {rate(metric, 'application')} * 0"


def mean_so_far(metric: str, by: str) -> str:
    """Of all values of a histogram since the replicas began: what happens seldom has no rate worth a line."""
    return f"sum by ({by}) ({metric}_sum{{{APP}}}) / sum by ({by}) ({metric}_count{{{APP}}})"


def share_so_far(metric: str, by: str, matchers: str) -> str:
    """Share of a counter that ``matchers`` fit since the replicas began."""
    everything = f"sum by ({by}) ({metric}{{{APP}}})"
    return f"(sum by ({by}) ({metric}{{{APP}, {matchers}}}) or {everything} * 0) / {everything}"


def share_of_requests(*matchers: str) -> str:
    """Share of those that one of ``matchers`` fits; no two of them fit the same."""
    requests = "ray_deeptrust_requests_total"
    chosen = " or ".join(f"rate({requests}{{{APP}, {each}}}{RATE})" for each in matchers)
    everything = rate(requests, "application")
    # 0 and not nothing, where there has been none
    return f"(sum by (application) ({chosen}) or {everything} * 0) / {everything}"
