"""Tables, files and report.html, made from results."""
