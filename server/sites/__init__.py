"""The coordinator's view of the sites: enrolment, requests, replies and departures."""
