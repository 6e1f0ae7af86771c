"""Five published systems that generate or read medical data, taught and replicated in notebooks."""

import warnings

warnings.filterwarnings("ignore", message="IProgress not found")   # without ipywidgets progress bars are plain text, which is fine
