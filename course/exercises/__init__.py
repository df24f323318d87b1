"""The exercises, a file for each lesson in Jupytext's percent format; `course.sources` says what its tags mean."""
