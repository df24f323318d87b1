"""Rows of the arena that are told what no defender can know; each is a defense whose assumptions say so."""
