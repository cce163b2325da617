"""Text and tokens for evaluation, calibration and export."""
