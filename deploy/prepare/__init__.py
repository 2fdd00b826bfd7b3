"""Downloaded or own images become the canonical folder that every other command reads."""
