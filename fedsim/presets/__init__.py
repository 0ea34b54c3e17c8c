"""Comparisons that come with fedsim: plain YAML files to run or to copy."""
