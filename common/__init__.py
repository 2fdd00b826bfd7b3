"""Code shared by server and clients: settings, messages, networks, statistics, metrics, errors."""
