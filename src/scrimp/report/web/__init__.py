"""The HTML report: its words and tables (Python) and its charts (JavaScript), for `scrimp.report.page`."""
