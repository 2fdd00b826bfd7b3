"""The YAML files of settings, shipped inside the app bundle."""
