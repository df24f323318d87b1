"""The attacks: a trigger that is planted, a behavior it is bound to, and the poisoned rows that do the binding."""
