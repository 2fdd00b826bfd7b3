"""The page of the report: a Jinja template and its style, as strings because an app bundle ships code and YAML only.

No script, no font, no address of elsewhere; the content policy forbids them. Every value is escaped by the environment.
"""

from server.report.templates.figures import FIGURES
from server.report.templates.results import CLAIM_MACROS, RESULTS
from server.report.templates.style import STYLE

MACROS = """
{% macro shape(marker) %}
{% if marker == "o" %}<circle cx="15" cy="7" r="4"/>
{% elif marker == "s" %}<rect x="11.2" y="3.2" width="7.6" height="7.6"/>
{% elif marker == "^" %}<path d="M15 2.4 19.6 10.8H10.4Z"/>
{% elif marker == "D" %}<path d="M15 1.8 20.2 7 15 12.2 9.8 7Z"/>
{% elif marker == "v" %}<path d="M15 11.6 19.6 3.2H10.4Z"/>
{% else %}<path d="M13.4 2h3.2v3.4H20v3.2h-3.4V12h-3.2V8.6H10V5.4h3.4Z"/>{% endif %}
{% endmacro %}
{% macro swatch(index, line=true) %}
{% set number = index % palette|length %}
<svg class="swatch{{ '' if line else ' small' }}" aria-hidden="true" viewBox="{{ '0 0 30 14' if line else '8 0 14 14' }}"
 style="fill: var(--c{{ number }}); stroke: var(--c{{ number }})">
{% if line %}<line x1="0" y1="7" x2="30" y2="7" stroke-width="2"/>{% endif %}
<g stroke="none">{{ shape(markers[number]) }}</g></svg>
{%- endmacro %}
{% macro sample(dash, width=2) %}
<svg class="swatch" aria-hidden="true" viewBox="0 0 30 14"><line x1="0" y1="7" x2="30" y2="7" stroke="currentColor"
 stroke-width="{{ width }}" stroke-dasharray="{{ dash }}"/></svg>
{%- endmacro %}
{% macro drawing(d) %}
<picture><source media="screen and (prefers-color-scheme: dark)" srcset="{{ d.dark }}">
<img src="{{ d.light }}" alt="{{ d.alt }}" width="{{ d.width }}" height="{{ d.height }}"></picture>
{% endmacro %}
{% macro panel_class(number) %}panels{{ " single" if number == 1 else " pairs" if number in (2, 4) else "" }}{% endmacro %}
{% macro contour(name, dash) %}
<svg class="swatch overlay-key" aria-hidden="true" viewBox="0 0 30 14"><line class="{{ name }}" x1="3" y1="7" x2="27" y2="7" stroke-width="2.4" stroke-dasharray="{{ dash }}"/></svg>
{%- endmacro %}
"""  # noqa: E501 - markup

HEAD = """
<header>
<p class="eyebrow">fedsgcg report{% if dates %} · {{ dates[-1][1]|string|replace("T", " ")|truncate(16, true, "", 0) }}{% endif %}</p>
<h1>{{ title }}: how well does the model work {{ "at a hospital that took no part" if judged else "on cases that did not train it" }}?</h1>
<p class="headline">{{ headline }}</p>
<div class="banner {{ status }}" role="status">
<strong>{{ {"completed": "✓", "failed": "✕"}.get(status, "!") }} {{ status_word }}.</strong>{{ status_sentence }}
{% if troubled %}<ul>
{% for cell in troubled[:12] %}
<li>{{ cell.label }}: {{ cell.status }}{% if cell.reason %}. {{ cell.reason }}{% endif %}</li>
{% endfor %}
{% if troubled|length > 12 %}<li>and {{ troubled|length - 12 }} more, listed under “Runs”</li>{% endif %}
</ul>{% endif %}
{% if problems %}<ul>
{% for problem in problems %}<li>{{ problem.code }}, {{ problem.where }}: {{ problem.found }}; {{ problem.action }}</li>{% endfor %}
</ul>{% endif %}
</div>
<nav aria-label="Contents"><a href="#protocol">Protocol</a><a href="#results">Results</a>
{% if ablation %}<a href="#ablation">Ablation</a>{% endif %}
{% if differences %}<a href="#differences">Differences</a>{% endif %}
{% for sweep in sweeps %}<a href="#sweep-{{ loop.index }}">{{ sweep.name }}</a>{% endfor %}
{% if federation %}<a href="#federation">Federation</a>{% endif %}
{% if case_panels %}<a href="#cases">Every case</a>{% endif %}
{% if training %}<a href="#training">Convergence</a>{% endif %}
{% if shift %}<a href="#shift">Shift between hospitals</a>{% endif %}
<a href="#features">Features</a>
<a href="#overlays">Overlays</a><a href="#left">What left each hospital</a><a href="#appendix">Appendix</a></nav>
</header>
<section aria-labelledby="protocol">
<h2 id="protocol">Protocol</h2>
<dl class="protocol">
{% for topic, lines in protocol %}<div><dt>{{ topic }}</dt>{% for line in lines %}<dd>{{ line }}</dd>{% endfor %}</div>
{% endfor %}</dl>
</section>
"""  # noqa: E501 - markup

TAIL = """
<section aria-labelledby="left">
<h2 id="left">What left each hospital</h2>
{% if departures %}
<p class="about">
{% if departures[0].source == "ledger" %}From each hospital's own ledger, which is written before a message leaves; over all runs of a method.
{% else %}No ledger lies on this machine, so these are the bytes that reached the coordinator; over all runs of a method.{% endif %}
The columns are all the parts that the messages had.</p>
<div class="wide" tabindex="0"><table><caption>Bytes sent, by part of the message (1 kB = 1000 bytes). A message of a run that
was started twice counts twice.</caption>
<thead><tr><th scope="col">Method</th><th scope="col">Hospital</th><th scope="col">Messages</th><th scope="col">Training rounds</th>
{% for part in departure_parts %}<th scope="col">{{ part }}</th>{% endfor %}
<th scope="col">All</th><th scope="col">All, per training round</th>
{% if departures[0].source == "ledger" %}<th scope="col">Classes withheld</th>{% endif %}</tr></thead><tbody>
{% for row in departures %}<tr><th scope="row">{{ row.method }}</th><td>{{ row.site }}</td><td>{{ row.messages }}</td><td>{{ row.rounds }}</td>
{% for part in row.parts %}<td class="value">{{ part }}</td>{% endfor %}<td class="value">{{ row.total }}</td>
<td class="value">{{ row.per_round }}</td>{% if row.source == "ledger" %}<td>{{ row.withheld }}</td>{% endif %}</tr>
{% endfor %}</tbody></table></div>
{% else %}<p class="about">Nothing is recorded yet.</p>{% endif %}
</section>
<section aria-labelledby="appendix">
<h2 id="appendix">Appendix</h2>
<h3>Make this again</h3>
<pre>{% if command %}{{ command }}
{% endif %}fedsgcg report {{ folder }}</pre>
<p class="about">The first line goes on with what is missing in its run folder; the second makes this page again from the files. Every
figure of this page is also in <code>figures/</code> beside it, as SVG and PNG; those named <code>overlays</code> show patients, as the page does.</p>
<details{% if status != "completed" %} open{% endif %}><summary>Runs ({{ cells|length }})</summary>
<div class="wide" tabindex="0"><table><caption>Every run of the study. The hash is the SHA-256 of the chosen model's names, shapes
and values. {{ hash_note }}</caption>
<thead><tr><th scope="col">Method</th><th scope="col">Held out</th>{% if alone %}<th scope="col">Trained alone</th>{% endif %}<th scope="col">Seed</th><th scope="col">Status</th><th scope="col">Time</th>
<th scope="col">Chosen round</th><th scope="col">Model hash</th></tr></thead><tbody>
{% for row in cells %}<tr><th scope="row">{{ row.cell.method }}</th><td>{{ row.cell.heldout or "none" }}</td>{% if alone %}<td>{{ row.cell.trained_on or "–" }}</td>{% endif %}<td>{{ row.cell.seed }}</td>
<td class="status-{{ row.cell.status }}">{{ row.cell.status }}{% if row.cell.reason %}<small>{{ row.cell.reason }}</small>{% endif %}</td>
<td class="value">{{ row.time }}</td><td>{{ row.round }}</td><td class="hash"><code>{{ row.digest }}</code></td></tr>
{% endfor %}</tbody></table></div></details>
{% if case_table %}
<details><summary>Every case ({{ cases_in_all }} rows)</summary>
<div class="wide" tabindex="0"><table><caption>Mean over seeds, lowest Dice first; distances in {{ unit }}. A dash: not defined, because one
mask is empty.{% if case_table|length < cases_in_all %} The first {{ case_table|length }} rows; all are in results.parquet.{% endif %}</caption>
<thead><tr><th scope="col">Structure</th><th scope="col">Hospital</th><th scope="col">Case</th><th scope="col">Method</th>
<th scope="col" class="num">Dice</th><th scope="col" class="num">ASD</th><th scope="col" class="num">ASSD</th><th scope="col" class="num">HD95</th>
<th scope="col" class="num">Seeds</th><th scope="col">Remark</th></tr></thead><tbody>
{% for row in case_table %}<tr><td>{{ row.structure }}</td><td>{{ row.site }}</td><th scope="row">{{ row.case }}</th><td>{{ row.method }}</td>
<td class="num">{{ row.dice_text }}</td><td class="num">{{ row.asd_text }}</td><td class="num">{{ row.assd_text }}</td>
<td class="num">{{ row.hd95_text }}</td><td class="num">{{ row.seeds }}</td><td>{{ row.remark }}</td></tr>
{% endfor %}</tbody></table></div></details>
{% endif %}
{% if shared_settings or differing_settings %}
<details><summary>Settings</summary>
{% if differing_settings %}<div class="wide" tabindex="0"><table><caption>What differs between the methods.</caption>
<thead><tr><th scope="col">Setting</th>{% for name in setting_methods %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead><tbody>
{% for name, values in differing_settings %}<tr><th scope="row">{{ name }}</th>{% for value in values %}<td>{{ value }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>{% endif %}
<pre>{{ shared_settings }}</pre></details>
{% endif %}
{% if versions %}
<details><summary>Versions</summary><div class="wide" tabindex="0"><table><caption>Software of the machine that ran the study.</caption>
<thead><tr><th scope="col">Package</th><th scope="col">Version</th></tr></thead><tbody>
{% for name, version in versions.items() %}<tr><th scope="row">{{ name }}</th><td>{{ version }}</td></tr>{% endfor %}
{% for name, value in dates %}<tr><th scope="row">{{ name }}</th><td>{{ value }}</td></tr>{% endfor %}</tbody></table></div></details>
{% endif %}
</section>
"""  # noqa: E501 - markup

PAGE = f"""{MACROS}{CLAIM_MACROS}<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="color-scheme" content="light dark">
<title>{{{{ title }}}} – fedsgcg report</title>
<style>{STYLE}</style>
</head>
<body>
<main>
{HEAD}{RESULTS}{FIGURES}{TAIL}</main>
</body>
</html>
"""
