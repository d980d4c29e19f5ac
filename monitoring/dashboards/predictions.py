"""What the service says: verdicts, captions, tags, and what people say to them."""

from __future__ import annotations

from monitoring.dashboards.board import Board, Panel, Query
from monitoring.dashboards.promql import APP, APPROXIMATE, RATE, mean, mean_so_far, quantile, rate, share_so_far

PREDICTIONS = Board(
    "deeptrust-predictions",
    "DeepTrust: predictions",
    (
        (
            "Verdicts",
            (
                Panel(
                    "Verdicts by revision",
                    "ops",
                    (Query(rate("ray_deeptrust_verdicts_total", "verdict, revision"), "{{verdict}} {{revision}}"),),
                    stacked=True,
                ),
                Panel(
                    "Share of each verdict",
                    "percentunit",
                    (
                        Query(
                            rate("ray_deeptrust_verdicts_total", "verdict, revision")
                            + " / ignoring (verdict) group_left () "
                            + rate("ray_deeptrust_verdicts_total", "revision"),
                            "{{verdict}} {{revision}}",
                        ),
                    ),
                    "Production and canary side by side, by revision",
                ),
                Panel(
                    "Probability of AI: pictures up to each bound",
                    "percentunit",
                    (
                        Query(
                            rate("ray_deeptrust_ai_probability_bucket", "le")
                            + " / ignoring (le) group_left () "
                            + f"sum(rate(ray_deeptrust_ai_probability_count{{{APP}}}{RATE}))",
                            "≤ {{le}}",
                        ),
                    ),
                    "Cumulative; the distance between two lines is the share of the pictures between them",
                ),
                Panel(
                    "Probability of AI, mean",
                    "percentunit",
                    (Query(mean("ray_deeptrust_ai_probability", "revision"), "{{revision}}"),),
                    APPROXIMATE,
                ),
                Panel(
                    "What files declare",
                    "ops",
                    (Query(rate("ray_deeptrust_provenance_total", "c2pa, declared"), "C2PA {{c2pa}}, {{declared}}"),),
                ),
                Panel(
                    "Share of the canaries",
                    "percentunit",
                    (Query(f"max by (stage) (ray_deeptrust_canary_share{{{APP}}})", "{{stage}}"),),
                ),
                Panel(
                    "Answers of trials",
                    "ops",
                    (
                        Query(
                            rate("ray_deeptrust_trial_answers_total", "stage, role, outcome"),
                            "{{stage}}: {{role}}, {{outcome}}",
                        ),
                    ),
                    "`dropped`: the other model was not asked, too many pictures were being compared",
                ),
                Panel(
                    "Agreement of candidate and production, mean",
                    "percentunit",
                    (Query(mean_so_far("ray_deeptrust_trial_agreement", "stage, revision"), "{{stage}} {{revision}}"),),
                    "By the candidate's revision, over all that the replicas have compared; of captions and tags "
                    "approximate, by buckets",
                ),
            ),
        ),
        (
            "Feedback",
            (
                Panel(
                    "Feedback by part",
                    "short",
                    (Query(f"sum by (part, judged) (ray_deeptrust_feedback_total{{{APP}}})", "{{part}} {{judged}}"),),
                    "Events that the replicas have taken since they began",
                ),
                Panel(
                    "Share of the judged answers that are called wrong",
                    "percentunit",
                    (
                        Query(
                            share_so_far("ray_deeptrust_feedback_total", "part, answer, revision", 'judged="wrong"'),
                            "{{part}} {{answer}} {{revision}}",
                        ),
                    ),
                    "Who gives feedback has mostly something to complain of: compare revisions, not with nothing",
                ),
            ),
        ),
        (
            "Captions and tags",
            (
                Panel(
                    "Words of a caption, mean",
                    "short",
                    (Query(mean("ray_deeptrust_caption_words", "revision"), "{{revision}}"),),
                    APPROXIMATE,
                ),
                Panel(
                    "Words of a caption, longest twentieth",
                    "short",
                    (Query(quantile(0.95, "ray_deeptrust_caption_words", "revision"), "{{revision}}"),),
                    APPROXIMATE,
                ),
                Panel(
                    "Tags of a picture, mean",
                    "short",
                    (Query(mean("ray_deeptrust_picture_tags", "revision"), "{{revision}}"),),
                ),
                Panel(
                    "Who proposed the tags",
                    "ops",
                    (Query(rate("ray_deeptrust_tags_total", "origin, revision"), "{{origin}} {{revision}}"),),
                    "`rules` fill up what the model leaves open",
                    stacked=True,
                ),
            ),
        ),
    ),
)
