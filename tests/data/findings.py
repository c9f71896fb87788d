"""What `sfumato check` found, by name of the image."""


def found(report, kind):
    return sorted(name for line in report.lines if line.kind == kind for name in line.names)
