"""Rows: generated, read from files, and what an attacker, a defender and an examiner each hold of them."""
