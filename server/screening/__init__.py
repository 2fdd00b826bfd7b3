"""Screens: comparing the sites' contributions of a round with each other and with their history."""
