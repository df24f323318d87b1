"""Exercises that check themselves: `check("04.1", signature)` tells how far an answer is, and what is likely wrong.

One source for each lesson, `exercises/NN.py`, makes the student's sheet (`sheets/NN.ipynb`) and the solutions
(`solutions/NN.ipynb`). `INSTRUCTOR.md` is for whoever teaches with them.
"""

from course.checking import check

__all__ = ["check"]
