"""Every setting, typed and checked, and how YAML and command line become one plan."""
