"""Stages: resumable jobs with inputs and outputs on disk, and the recipe that chains them."""
