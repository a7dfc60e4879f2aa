"""The sections of the comparison report, one file a subject; `sftflow.report.comparison_page` puts them together."""
