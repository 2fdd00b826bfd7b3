"""Names and tables of the folders that a study and a run write."""
