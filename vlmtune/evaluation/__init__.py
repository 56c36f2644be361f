"""Answers the questions of a mix, scores the answers, and reports a run."""
