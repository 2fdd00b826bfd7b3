"""The command lines `fedsgcg` and `fedsgcg-site`."""
