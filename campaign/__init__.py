"""Decides, submits, records, resumes, reports: the loop around the stages, and the only command line."""
