"""Metrics for Prometheus and dashboards for Grafana (extra `monitoring`)."""
