"""The YAML settings, shipped inside the app bundle."""
