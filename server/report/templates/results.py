"""Sections of the page that hold numbers and claims: results, ablation, differences, sweeps, federation (Jinja)."""

CLAIM_MACROS = """
{% macro claim_table(groups, about, first="Comparison") %}
<table class="stacked" role="table"><caption>{{ about }}</caption>
<thead role="rowgroup"><tr role="row"><th scope="col" role="columnheader">{{ first }}</th><th scope="col" role="columnheader">Difference</th>
<th scope="col" role="columnheader">95 % interval</th><th scope="col" role="columnheader">Around zero</th>
<th scope="col" role="columnheader">Cases</th><th scope="col" role="columnheader">p, corrected</th>
<th scope="col" role="columnheader">Each seed</th><th scope="col" role="columnheader">In words</th></tr></thead>
{% for title, rows in groups %}
<tbody role="rowgroup"><tr class="group" role="row"><th scope="rowgroup" role="rowheader" colspan="8">{{ title }}</th></tr>
{% for row in rows %}
<tr role="row"><th scope="row" role="rowheader">{{ row.title }}</th>
<td role="cell" data-label="Difference"><div class="value">{{ row.mean }}</div></td>
<td role="cell" data-label="95 % interval"><div class="value">{{ row.interval }}</div></td>
<td role="cell" data-label="Around zero"><div>{{ row.bar }}</div></td>
<td role="cell" data-label="Cases"><div>{{ row.cases }}</div></td>
<td role="cell" data-label="p, corrected"><div class="value">{{ row.p }}</div></td>
<td role="cell" data-label="Each seed" class="seeds"><div>{{ row.seeds }}</div></td>
<td role="cell" data-label="In words"><div>{% if row.holds %}<b>{{ row.sentence }}</b>{% else %}{{ row.sentence }}{% endif %}{% if row.directions %}<small>{{ row.directions }}</small>{% endif %}</div></td></tr>
{% endfor %}</tbody>
{% endfor %}</table>
{% endmacro %}
{% macro claim_list(sentences, most=12) %}
<ul class="claims">
{% for claim in sentences[:most] %}<li class="{{ "holds" if claim.holds else "open" }}">{{ claim.text }}</li>
{% endfor %}</ul>
{% if sentences|length > most %}<details><summary>{{ sentences|length - most }} more sentences</summary><ul class="claims">
{% for claim in sentences[most:] %}<li class="{{ "holds" if claim.holds else "open" }}">{{ claim.text }}</li>
{% endfor %}</ul></details>{% endif %}
{% endmacro %}
{% macro paper_cell(cell, title, dense) %}
{% if cell.missing is defined %}<td role="cell" class="missing" data-label="{{ title }}"><div>missing</div></td>
{% else %}<td role="cell" data-label="{{ title }}"><div><span class="value">
{%- for part in cell.parts %}{% if part.bold %}<b>{{ part.text }}</b>{% else %}{{ part.text }}{% endif %}{{ "" if loop.last else " / " }}{% endfor -%}
</span>{% if cell.sd %}<small{% if cell.parts|length == 1 and not dense %} class="sd"{% endif %}>{{ cell.sd }}</small>{% endif %}{% if cell.interval %}<small>{{ cell.interval }}</small>{% endif %}
{% for note in cell.notes %}<small>{{ note }}</small>{% endfor %}</div></td>
{% endif %}
{% endmacro %}
{% macro paper_table(table, caption, ticks=false) %}
{% set lead = 2 if ticks else 1 %}
<div class="wide"><table class="stacked paper{{ " dense" if table.dense }}" role="table"><caption>{{ caption }}</caption>
<thead role="rowgroup"><tr role="row">
{% if ticks %}<th scope="col" role="columnheader">RAM</th><th scope="col" role="columnheader">SgCG</th>
{% else %}<th scope="col" role="columnheader">Method</th>{% endif %}
{% for column in table.columns %}<th scope="col" role="columnheader">{{ column.title }}{% if column.detail %}<small>{{ column.detail }}</small>{% endif %}</th>
{% endfor %}</tr></thead>
{% for group in table.groups %}
<tbody role="rowgroup">{% if group.title %}<tr class="group" role="row"><th scope="rowgroup" role="rowheader" colspan="{{ table.columns|length + lead }}">{{ group.title }}</th></tr>{% endif %}

{% for row in group.rows %}
<tr role="row"{% if row.published or row.counted %} class="printed"{% endif %}>
{% if ticks %}<th scope="row" role="rowheader"><span class="tick">{{ "✓" if row.ticks and row.ticks[0] else "–" }}</span><span class="onlynarrow"> RAM</span></th>
<td role="cell" data-label="SgCG"><div><span class="tick">{{ "✓" if row.ticks and row.ticks[1] else "–" }}</span>{% if row.published %} <small>printed</small>{% endif %}</div></td>
{% elif row.published %}<th scope="row" role="rowheader">{{ row.label }}<span class="tag">printed</span></th>
{% elif row.counted %}<th scope="row" role="rowheader">{{ row.label }}<span class="tag">as the papers count</span></th>
{% else %}<th scope="row" role="rowheader"><span class="swatched">{{ swatch(row.index, false) }}{{ row.label }}</span></th>{% endif %}
{% for cell in row.cells %}{{ paper_cell(cell, table.columns[loop.index0].title, table.dense) }}{% endfor %}</tr>
{% endfor %}</tbody>
{% endfor %}</table></div>
{% endmacro %}
"""  # noqa: E501 - markup

RESULTS = """
<section aria-labelledby="results">
<h2 id="results">Results</h2>
{% if not results %}<p class="about">No result yet.</p>{% endif %}
{% for table in papers %}
{{ paper_table(table, table.title ~ ": " ~ table.structures
  ~ (" at hospitals that took no part in training; " if table.judged else " on the hospitals’ own validation cases; ") ~ paper_seeds
  ~ ("; under the average its 95 % interval over cases" if table.columns|length > 1 else "")
  ~ ". Bold: best of its column, and every paired difference to the other rows holds.") }}
{% endfor %}
{% if paper_notes %}<div class="notes printed-notes"><p>{{ paper_notes[0] }}</p><ul>{% for note in paper_notes[1:] %}<li>{{ note }}</li>{% endfor %}</ul></div>{% endif %}
{% if notes %}<ul class="notes">{% for note in notes %}<li>{{ note }}</li>{% endfor %}</ul>{% endif %}
{% if results %}
<details{% if results|length == 1 and methods|length < 4 %} open{% endif %}><summary>All metrics with intervals, by structure</summary>
{% for table in results %}
{% if results|length > 1 %}<h3>{{ table.structure }}</h3>{% endif %}
<div class="wide"><table class="stacked{{ " dense" if table.dense }}" role="table">
<caption>{{ table.structure }}: mean ± standard deviation; below it the 95 % interval over cases. A case is first averaged over
seeds; the interval is Student’s t with a correction for skewness, hospitals and trainings as they are. The standard deviation is over cases, in the average
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
<tr role="row"><th scope="row" role="rowheader"><span class="swatched">{{ swatch(colours[row.method], false) }}{{ row.method }}</span></th>
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
</details>
{% endif %}
{% if others %}
<details><summary>Other evaluations</summary>
<div class="wide" tabindex="0"><table><caption>Observers, and validation cases of runs that held no hospital out; means over runs. They
take no part in the numbers above.</caption>
<thead><tr><th scope="col">Method</th><th scope="col">Site</th><th scope="col">Structure</th><th scope="col">Dice</th>
<th scope="col">95 % interval</th><th scope="col">Cases</th></tr></thead><tbody>
{% for row in others %}<tr><th scope="row">{{ row.method }}</th><td>{{ row.site }}</td><td>{{ row.structure }}</td>
<td>{{ row.dice_mean|show(3) }}</td><td>{{ row.dice_low|show(3) }} to {{ row.dice_high|show(3) }}</td><td>{{ row.cases }}</td></tr>
{% endfor %}</tbody></table></div></details>
{% endif %}
</section>
{% if ablation %}
<section aria-labelledby="ablation">
<h2 id="ablation">What each part adds</h2>
<p class="about">RAM mixes the low frequencies of images and restores them, SgCG adds the contrastive term on class prototypes. A tick says
that the part took part in training; whether the differences hold is told below.</p>
{% for table in ablation %}
{% if ablation|length > 1 and not loop.first %}<details><summary>{{ table.title }}</summary>{% elif ablation|length > 1 %}<h3>{{ table.title }}</h3>{% endif %}
{{ paper_table(table, "Ablation: " ~ table.structures ~ " (" ~ paper_seeds ~ ").", true) }}
{% if not loop.first %}</details>{% endif %}
{% endfor %}
</section>
{% endif %}
{% if differences %}
<section aria-labelledby="differences">
<h2 id="differences">Differences between methods</h2>
<p class="about">Both judged the same cases with the same seeds; a case counts where both have a value, averaged over seeds. Cases that one
pair of models judged share these models, so the unit is not the case. The interval is Student’s over the mean differences of the hospitals
{%- if not judged %} and of the seeds, which all hospitals share{% endif %} (at a single hospital over its seeds and cases); the test flips
the signs of whole trainings{% if judged %} (held-out hospital and seed){% endif %}, two-sided, exact up to 16 trainings, its p value corrected for the
{{ differences.family }} comparisons of the table (Holm). A difference holds with more than one seed, when the interval excludes zero and
the test agrees. Few trainings cannot show much: p is at least 0.125 with four and 0.0005 with twelve, before the correction. There is no
verdict where both mean Dice are below {{ dice_floor }}. No difference shown does not mean that there is none.</p>
{{ claim_list(differences.sentences) }}
<details><summary>The numbers behind these sentences, and surface distances</summary>
{{ claim_table(differences.groups, "Mean paired difference over all hospitals (each counts the same). For Dice more is better, for distances less.") }}</details>
{% if hospital_tables %}
<details><summary>Hospital by hospital</summary>
<p class="about">Each table is a family of its own for the correction.</p>
{% for table in hospital_tables %}
<details class="inner"><summary>{{ table.method }} minus {{ table.reference }}</summary>
{{ claim_table(table.groups, "Mean paired difference; p values corrected for the " ~ table.family ~ " comparisons of this table.", "Hospital") }}</details>
{% endfor %}</details>
{% endif %}
</section>
{% endif %}
{% for sweep in sweeps %}
<section aria-labelledby="sweep-{{ loop.index }}">
<h2 id="sweep-{{ loop.index }}">Swept setting: {{ sweep.name }}</h2>
<p class="about">Mean over {{ place }} (each hospital counts the same) with the 95 % interval over cases
{%- if sweep.logarithmic %}; the setting’s axis is logarithmic{% endif %}
{%- if sweep.usual %}; a ring marks the value of the runs that did not sweep it{% endif %}
{%- if sweep.beside %}; grey: what does not have the setting{% endif %}.
{% if judged %}The held-out hospitals are shown, not used: a value that is to be kept must be chosen on source validation
{%- if nested %}, as <code>select</code> did within each fold{% else %}. Unless it is chosen anew within each fold (<code>select</code>), that
uses validation patients of hospitals that are held out in other folds{% endif %}.
{% else %}No hospital was held out, so a value may be chosen by this; the choice then used patients of all these hospitals, also of one that
is held out later. To choose within each fold instead, hold hospitals out and set <code>select</code>.{% endif %}</p>
{% if sweep.key|length + sweep.beside|length > 1 %}<ul class="key">{% for line in sweep.key %}<li>{{ swatch(line.index) }}{{ line.title }}</li>{% endfor %}
{% for line in sweep.beside %}<li>{{ sample(line.dash, 1.4) }}{{ line.title }}</li>{% endfor %}</ul>{% endif %}
{% if sweep.note %}<p class="about">{{ sweep.note }}</p>{% endif %}
{% if sweep.left_out %}<p class="about">{{ sweep.left_out }} more lines are in the table only.</p>{% endif %}
<div class="{{ panel_class(sweep.panels|length) }}">
{% for panel in sweep.panels %}<figure><figcaption><b>{{ panel.title }}</b></figcaption>{{ drawing(panel.drawing) }}</figure>
{% endfor %}</div>
{{ claim_list(sweep.claims.sentences, 6) }}
<details><summary>Values and differences</summary>
<div class="wide" tabindex="0"><table><caption>Mean and 95 % interval over {{ place }}.</caption>
<thead><tr><th scope="col">Line</th><th scope="col">{{ sweep.name }}</th>
{% for structure in structures %}<th scope="col">Dice{% if structures|length > 1 %}, {{ structure }}{% endif %}</th><th scope="col">ASD, {{ sweep.unit }}{% if structures|length > 1 %}, {{ structure }}{% endif %}</th>{% endfor %}</tr></thead><tbody>
{% for row in sweep.rows %}<tr><th scope="row">{{ row.line }}</th><td>{{ row.value }}{% if row.usual %}<small>not swept</small>{% endif %}</td>
{% for cell in row.cells %}<td><span class="value">{{ cell.value }}</span><small>{{ cell.interval }}</small>{% if cell.note %}<small>{{ cell.note }}</small>{% endif %}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{{ claim_table(sweep.claims.groups, "Each value against the one that was not swept, or the first; p values corrected for the " ~ sweep.claims.family ~ " comparisons of this table.") }}
</details>
</section>
{% endfor %}
{% if federation %}
<section aria-labelledby="federation">
<h2 id="federation">What federation costs</h2>
<p class="about">The same training {{ "three" if federation.present|length == 3 else "two" }} ways: {% for name in federation.present %}<b>{{ name }}</b>, {{ federation_words[name].partition(": ")[2] }}{{ "" if loop.last else "; " }}{% endfor %}.
Mean over {{ place }} with the 95 % interval over cases.
{% if "local" in federation.present %} A local number is the mean over the models that single hospitals made, case by case.{% endif %}</p>
{% if federation.steps %}<p class="about">Training steps one after the other in a round: {% for name in federation.present if name in federation.steps %}<b>{{ name }}</b> {{ federation.steps[name] }}{{ "" if loop.last else ", " }}{% endfor %}.
A difference between them may come from the number of steps as well as from the federation: <code>federation.rounds</code> and <code>method.steps_per_round</code> can make them equal.</p>
{% endif %}
{% if federation.note %}<p class="about">{{ federation.note }}</p>{% endif %}
<div class="{{ panel_class(federation.panels|length) }}">
{% for panel in federation.panels %}<figure><figcaption><b>{{ panel.title }}</b></figcaption>{{ drawing(panel.drawing) }}</figure>
{% endfor %}</div>
{{ claim_list(federation.claims.sentences) }}
<details><summary>The numbers behind these sentences, and surface distances</summary>
{{ claim_table(federation.claims.groups, "Mean paired difference over all hospitals; p values corrected for the " ~ federation.claims.family ~ " comparisons of this table.") }}</details>
</section>
{% endif %}
"""  # noqa: E501 - markup
