"""The page of the report: a Jinja template and its style, as strings because an app bundle ships code and YAML only.

No script, no font, no address of elsewhere; the content policy forbids them. Every value is escaped by the environment.
"""

from server.report_style import STYLE

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
{% macro difference_table(metrics) %}
<table class="stacked" role="table"><caption>Mean paired difference with bootstrap 95 % interval over cases.</caption>
<thead role="rowgroup"><tr role="row"><th scope="col" role="columnheader">Hospital</th><th scope="col" role="columnheader">Difference</th>
<th scope="col" role="columnheader">95 % interval</th><th scope="col" role="columnheader">Around zero</th>
<th scope="col" role="columnheader">Cases</th><th scope="col" role="columnheader">Each seed</th>
<th scope="col" role="columnheader">In words</th></tr></thead>
{% for title, rows in metrics %}
<tbody role="rowgroup"><tr class="group" role="row"><th scope="rowgroup" role="rowheader" colspan="7">{{ title }}</th></tr>
{% for row in rows %}
<tr role="row"><th scope="row" role="rowheader">{{ row.site }}</th>
<td role="cell" data-label="Difference"><div class="value">{{ row.mean }}</div></td>
<td role="cell" data-label="95 % interval"><div class="value">{{ row.interval }}</div></td>
<td role="cell" data-label="Around zero"><div>{{ row.bar }}</div></td>
<td role="cell" data-label="Cases"><div>{{ row.cases }}</div></td>
<td role="cell" data-label="Each seed" class="seeds"><div>{{ row.seeds }}</div></td>
<td role="cell" data-label="In words"><div>{% if row.excludes %}<b>{{ row.sentence }}</b>{% else %}{{ row.sentence }}{% endif %}</div></td></tr>
{% endfor %}</tbody>
{% endfor %}</table>
{% endmacro %}
{% macro method_key() %}{% for method in methods %}<li>{{ swatch(loop.index0) }}{{ method }}</li>{% endfor %}{% endmacro %}
"""  # noqa: E501 - markup

HEAD = """
<header>
<p class="eyebrow">fedsgcg report{% if dates %} · {{ dates[-1][1]|string|replace("T", " ")|truncate(16, true, "", 0) }}{% endif %}</p>
<h1>{{ title }}: how well does the model work at a hospital that took no part?</h1>
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
{% if differences %}<a href="#differences">Differences</a>{% endif %}
{% if case_panels %}<a href="#cases">Every case</a>{% endif %}
{% if training %}<a href="#training">Training</a>{% endif %}
{% if shift %}<a href="#shift">Shift between hospitals</a>{% endif %}
<a href="#overlays">Overlays</a><a href="#left">What left each hospital</a><a href="#appendix">Appendix</a></nav>
</header>
<section aria-labelledby="protocol">
<h2 id="protocol">Protocol</h2>
<dl class="protocol">
{% for topic, lines in protocol %}<div><dt>{{ topic }}</dt>{% for line in lines %}<dd>{{ line }}</dd>{% endfor %}</div>
{% endfor %}</dl>
</section>
"""  # noqa: E501 - markup

RESULTS = """
<section aria-labelledby="results">
<h2 id="results">Results</h2>
{% if not results %}<p class="about">No result yet.</p>{% endif %}
{% for table in results %}
{% if results|length > 1 %}<h3>{{ table.structure }}</h3>{% endif %}
<div class="wide"><table class="stacked{{ " dense" if table.dense }}" role="table">
<caption>{{ table.structure }}: mean ± standard deviation; below it the bootstrap 95 % interval. A case is first averaged over
seeds, then cases are drawn anew within each hospital (2000 times). The standard deviation is over cases, in the average
column over hospitals. “best” marks the best mean of a column; whether it is a proven difference is told below.</caption>
<thead role="rowgroup"><tr role="row"><th scope="col" role="columnheader">Method</th>
{% for column in table.columns %}
<th scope="col" role="columnheader">{{ column.title }}<small>{{ column.detail }}</small></th>
{% endfor %}</tr></thead>
{% for metric in table.metrics %}
<tbody role="rowgroup">
<tr class="group" role="row"><th scope="rowgroup" role="rowheader" colspan="{{ table.columns|length + 1 }}">{{ metric.title }}
<small>{{ metric.meaning }}</small></th></tr>
{% for row in metric.rows %}
<tr role="row"><th scope="row" role="rowheader"><span class="swatched">{{ swatch(row.index, false) }}{{ row.method }}</span></th>
{% for cell in row.cells %}
{% if cell.missing is defined %}<td role="cell" class="missing" data-label="{{ table.columns[loop.index0].title }}"><div>missing</div></td>
{% else %}<td role="cell"{% if cell.best %} class="best"{% endif %} data-label="{{ table.columns[loop.index0].title }}"><div>
<span class="value">{{ cell.value }}{% if cell.sd and not table.dense %} {{ cell.sd }}{% endif %}</span>
{% if cell.best %}<span class="tag">best</span>{% endif %}
{% if cell.sd and table.dense %}<small>{{ cell.sd }}</small>{% endif %}
{% if cell.interval != "–" %}<small>{{ cell.interval }}</small>{% endif %}{% for note in cell.notes %}<small>{{ note }}</small>{% endfor %}</div></td>
{% endif %}
{% endfor %}</tr>
{% endfor %}</tbody>
{% endfor %}
</table></div>
{% endfor %}
{% if notes %}<ul class="notes">{% for note in notes %}<li>{{ note }}</li>{% endfor %}</ul>{% endif %}
{% if others %}
<h3>Other evaluations</h3>
<div class="wide" tabindex="0"><table><caption>Observers, and validation cases of runs that held no hospital out; means over runs. They
take no part in the numbers above.</caption>
<thead><tr><th scope="col">Method</th><th scope="col">Site</th><th scope="col">Structure</th><th scope="col">Dice</th>
<th scope="col">95 % interval</th><th scope="col">Cases</th></tr></thead><tbody>
{% for row in others %}<tr><th scope="row">{{ row.method }}</th><td>{{ row.site }}</td><td>{{ row.structure }}</td>
<td>{{ row.dice_mean|show(3) }}</td><td>{{ row.dice_low|show(3) }} to {{ row.dice_high|show(3) }}</td><td>{{ row.cases }}</td></tr>
{% endfor %}</tbody></table></div>
{% endif %}
</section>
{% if differences %}
<section aria-labelledby="differences">
<h2 id="differences">Differences between methods</h2>
<p class="about">Both methods judged the same cases with the same seeds; a case counts where both have a value. The bar shows the
interval around zero. Several differences are looked at, without correction for their number: Dice on average over the hospitals is
the main one.</p>
{% for table in differences %}
<h3>{{ table.method }} minus {{ table.reference }}, {{ table.structure }}</h3>
{{ difference_table((table.metrics|list)[:1]) }}
<details><summary>Surface distances (negative: {{ table.method }} is closer)</summary>{{ difference_table((table.metrics|list)[1:]) }}</details>
{% endfor %}
</section>
{% endif %}
"""  # noqa: E501 - markup

FIGURES = """
{% if case_panels %}
<section aria-labelledby="cases">
<h2 id="cases">Every case</h2>
<p class="about">A point is one case of the held-out hospital, averaged over seeds. The box spans the middle half of the cases, the thick
bar is the median, thin lines join the same case.</p>
<ul class="key">{{ method_key() }}</ul>
{% for structure, panels in case_panels %}
{% if case_panels|length > 1 %}<h3>{{ structure }}</h3>{% endif %}
<div class="{{ panel_class(panels|length) }}">
{% for panel in panels %}<figure><figcaption><b>{{ panel.title }}</b> · {{ panel.detail }}</figcaption>{{ drawing(panel.drawing) }}</figure>
{% endfor %}</div>
{% endfor %}
</section>
{% endif %}
{% if training %}
<section aria-labelledby="training">
<h2 id="training">Training, round by round</h2>
<p class="about">Mean over the training hospitals (each counts the same) and over seeds; the band reaches from the lowest to the highest
seed. The supervised part of the loss is comparable between methods. Validation Dice is measured by the training hospitals on their own
validation cases, slice by slice, and belongs to the model of that round.</p>
<ul class="key">{{ method_key() }}{% if training_keys.whole %}<li>{{ sample("6 3", 1.4) }}whole loss, where it has a second part</li>{% endif %}
{% if training_keys.heldout %}<li>{{ sample("1.5 3", 1.6) }}held-out Dice, followed only (it chooses nothing)</li>{% endif %}</ul>
<div class="{{ panel_class(training|length) }}">
{% for panel in training %}<figure><figcaption><b>{{ panel.title }}</b></figcaption>{{ drawing(panel.drawing) }}</figure>
{% endfor %}</div>
</section>
{% endif %}
{% if shift %}
<section aria-labelledby="shift">
<h2 id="shift">Shift between hospitals, class by class</h2>
<p class="about">The pooled covariance of the features of a class splits exactly into a part between the hospitals' means and a part within
hospitals. The trace of the part between is the shift between the training hospitals that the network still sees. Both can shrink together
when all features shrink, so the share matters more than the height.</p>
<ul class="key">{% for name in shift_classes %}<li>{{ swatch(loop.index0) }}{{ name }}</li>{% endfor %}
<li>{{ sample("") }}between hospitals</li><li>{{ sample("6 3", 1.4) }}within hospitals</li></ul>
<div class="{{ panel_class(shift|length) }}">
{% for panel in shift %}<figure><figcaption><b>{{ panel.title }}</b>{% if panel.detail %} · {{ panel.detail }}{% endif %}</figcaption>
{{ drawing(panel.drawing) }}
{% if panel.shares %}<p class="shares">Share between hospitals at the end:
{% for entry in panel.shares %}{{ entry.name }} {{ entry.share }}{{ "" if loop.last else ", " }}{% endfor %}</p>{% endif %}
</figure>
{% endfor %}</div>
</section>
{% endif %}
<section aria-labelledby="overlays">
<h2 id="overlays">Worst, median and best case</h2>
{% if overlays %}
<p class="about">These are the hospitals' own images: patients, unless the data are synthetic. They are here because the hospitals' own folders lie on the machine that made this page; treat
the page as you treat the images. Shown is the slice with the largest true area, cropped around the structure; the Dice is that of the whole
case, mean over structures. Cases are named by alias.</p>
<ul class="key"><li><svg class="swatch overlay-key" aria-hidden="true" viewBox="0 0 30 14"><line x1="3" y1="7" x2="27" y2="7" stroke="#f0e442"
 stroke-width="2"/></svg>truth, solid</li><li><svg class="swatch overlay-key" aria-hidden="true" viewBox="0 0 30 14"><line x1="3" y1="7" x2="27"
 y2="7" stroke="#56b4e9" stroke-width="2.4" stroke-dasharray="6 4"/></svg>prediction, dashed</li></ul>
{% for block in overlays %}
<h3>{{ block.site }} <small class="aside">ranked by the Dice of {{ block.chosen_by }}, seed {{ block.seed }}</small></h3>
<div class="cases{{ " across" if methods|length > 2 }}" style="--methods: {{ [methods|length, 5]|min }}">
{% for case in block.cases %}
<div class="case"><h4>{{ case.rank|capitalize }}<small>case {{ case.case }}, slice {{ case.z }}</small></h4><div class="images">
{% for image in case.images %}<figure>
{% if image.drawing %}{{ image.drawing }}{% else %}<div class="absent">no picture of {{ image.method }} here</div>{% endif %}
<figcaption>{{ swatch(image.index, false) }}{{ image.method }}{% if image.dice %} · Dice {{ image.dice }}{% endif %}</figcaption></figure>
{% endfor %}</div></div>
{% endfor %}</div>
{% endfor %}
{% else %}
<p class="about">No overlay: pictures of patients stay at their hospital, and no hospital's folder lies on the machine that made this
page.</p>
{% endif %}
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
<p class="about">The first line goes on with what is missing in its run folder; the second makes this page again from the files.</p>
<details{% if status != "completed" %} open{% endif %}><summary>Runs ({{ cells|length }})</summary>
<div class="wide" tabindex="0"><table><caption>Every run of the study. The hash is the SHA-256 of the chosen model's names, shapes
and values.</caption>
<thead><tr><th scope="col">Method</th><th scope="col">Held out</th><th scope="col">Seed</th><th scope="col">Status</th><th scope="col">Time</th>
<th scope="col">Chosen round</th><th scope="col">Model hash</th></tr></thead><tbody>
{% for row in cells %}<tr><th scope="row">{{ row.cell.method }}</th><td>{{ row.cell.heldout or "none" }}</td><td>{{ row.cell.seed }}</td>
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

PAGE = f"""{MACROS}<!doctype html>
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
