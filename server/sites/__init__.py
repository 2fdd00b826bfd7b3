"""The hospitals as the coordinator meets them: enrolment, requests, replies, departures."""
