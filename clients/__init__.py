"""The hospital's side: reads cases, trains, evaluates. Replies leave through `guard.egress`."""
