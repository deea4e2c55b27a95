"""Report pages of runs, and pictures of data, detections and pre-training views."""
