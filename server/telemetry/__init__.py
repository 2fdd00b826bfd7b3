"""Metrics of running and finished federations for Prometheus.

    events.jsonl, journal, results  ->  follow  ->  state  ->  exporter  ->  Prometheus

The files of the run folders are the queue between a federation and its metrics: a follower reads
what was appended, in its own thread or process. Training never waits for a scraper, no event is
lost however long the follower is away, and after a restart the metrics are complete again.

`tracking` writes the same to experiment trackers: `points` are curves, `tensorboard` and `mlflow`
pass them to these libraries.

`names` is the table of all metrics, `state` computes them from events and rows, `follow` reads the
files, and `exporter` serves them.
"""
