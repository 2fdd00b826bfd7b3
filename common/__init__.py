"""What both sides share: statistics, loss, networks, metrics, settings, errors and the wire format."""
