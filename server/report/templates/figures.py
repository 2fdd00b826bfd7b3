"""Sections of the page that hold figures: cases, convergence, shift, features, overlays (Jinja)."""

FIGURES = """
{% macro folded(blocks, key) %}
{% for block in blocks %}
{% if block.title and not loop.first %}<details><summary>{{ block.title }}</summary>{% elif block.title %}<h3>{{ block.title }}</h3>{% endif %}
{% if key %}<ul class="key">{{ label_key(block.labels) }}{{ block.more }}</ul>{% endif %}
{% if block.left_out %}<p class="about">{{ block.left_out }} more are in the tables only.</p>{% endif %}
{% for part in block.parts %}
{% if part.title %}<h4 class="part">{{ part.title }}</h4>{% endif %}
<div class="{{ panel_class(part.panels|length) }}">
{% for panel in part.panels %}<figure><figcaption><b>{{ panel.title }}</b>{% if panel.detail %} · {{ panel.detail }}{% endif %}</figcaption>{{ drawing(panel.drawing) }}
{% if panel.shares is defined and panel.shares %}<p class="shares">Share between hospitals at the end:
{% for entry in panel.shares %}{{ entry.name }} {{ entry.share }}{{ "" if loop.last else ", " }}{% endfor %}</p>{% endif %}</figure>
{% endfor %}</div>
{% endfor %}
{% if block.title and not loop.first %}</details>{% endif %}
{% endfor %}
{% endmacro %}
{% macro label_key(labels) %}{% for label in labels %}<li>{{ swatch(colours[label]) }}{{ label }}</li>{% endfor %}{% endmacro %}
{% if case_panels %}
<section aria-labelledby="cases">
<h2 id="cases">Every case</h2>
<p class="about">A point is one {{ "case of the held-out hospital" if judged else "validation case" }}, averaged over seeds. The box spans the middle half of the cases, the thick
bar is the median, thin lines join the same case.</p>
{{ folded(case_panels, true) }}
</section>
{% endif %}
{% if training %}
<section aria-labelledby="training">
<h2 id="training">Convergence, round by round</h2>
<p class="about">Mean over the training hospitals (each counts the same) and over seeds; the band reaches from the lowest to the highest
seed. The supervised part of the loss is comparable between methods: with RAM’s two views it is their mean. Validation Dice is measured by the training hospitals on their own
validation cases, slice by slice, and belongs to the model of that round.
{% if judged and not training_keys.heldout %}The held-out hospital was judged at the end only; <code>federation.heldout_every</code> follows its Dice and ASD.{% endif %}</p>
<ul class="key">{% if training_keys.whole %}<li>{{ sample("6 3", 1.4) }}whole loss, where it has a second part</li>{% endif %}
{% if training_keys.heldout %}<li>{{ sample("1.5 3", 1.6) }}held-out hospital, followed only (it chooses nothing)</li>{% endif %}</ul>
{{ folded(training, true) }}
</section>
{% endif %}
{% if shift %}
<section aria-labelledby="shift">
<h2 id="shift">Shift between hospitals, class by class</h2>
<p class="about">The pooled covariance of the features of a class splits exactly into a part between the hospitals' means and a part within
hospitals. The trace of the part between is the shift between the training hospitals that the network still sees. Both can shrink together
when all features shrink, so the share matters more than the height. While training, every hospital is normalised by its own batches, which
hides a part of the shift; the share at the end is that of the chosen model, all hospitals under the normalisation of evaluation.</p>
<ul class="key">{% for name in shift_classes %}<li>{{ swatch(loop.index0) }}{{ name }}</li>{% endfor %}
<li>{{ sample("") }}between hospitals</li><li>{{ sample("6 3", 1.4) }}within hospitals</li></ul>
{{ folded(shift, false) }}
</section>
{% endif %}
<section aria-labelledby="features">
<h2 id="features">Pixel features</h2>
{% if tsne.absent is defined %}<p class="about">{{ tsne.absent }}</p>
{% else %}
<p class="about">t-SNE of sampled pixels of the run with {{ tsne.heldout or "no hospital" }} held out, seed {{ tsne.seed }}; each method has its own
features, so places and distances of two pictures must not be compared. What can be compared stands in words, measured in the features.</p>
{% for row in tsne.rows %}
<h3>{{ row.method }}</h3>
<p class="about">{{ row.text }}</p>
<div class="panels planes">
{% for panel in row.panels %}<figure><figcaption><b>{{ panel.title }}</b></figcaption>{{ drawing(panel.drawing) }}
<ul class="key">{% for name in (tsne.classes if loop.first else tsne.sites) %}<li>{{ swatch(loop.index0, false) }}{{ name }}</li>{% endfor %}</ul></figure>
{% endfor %}</div>
{% endfor %}
{% endif %}
{% for kind in likeness.kinds %}
<h3>{{ "How alike the classes are: cosine of their mean features" if kind == "cosine" else "How alike SgCG takes them to be" }}</h3>
<p class="about">{% if kind == "cosine" %}One is the same direction. Classes that are told apart well lie far below one.{% else %}A row is the mean
pixel of a class; its numbers are the shares that the contrastive loss gives to each class, covariances and temperature included
(softmax of the logits). The closer the diagonal to one, the less there is left to push apart.{% endif %}</p>
<div class="panels matrices">
{% for panel in likeness.panels if panel.kind == kind %}<figure><figcaption><b>{{ panel.title }}</b> · {{ panel.detail }}{% if kind == "share" %}, temperature {{ panel.tau }}{% endif %}</figcaption>
{{ drawing(panel.drawing) }}</figure>
{% endfor %}</div>
{% endfor %}
</section>
<section aria-labelledby="overlays">
<h2 id="overlays">Worst, median and best case</h2>
{% if overlays %}
<p class="about">These are the hospitals' own images: patients, unless the data are synthetic. They are here because the hospitals' own folders lie on the machine that made this page; treat
the page as you treat the images. Shown is the slice with the largest true area, cropped around the structure; the Dice is that of the whole
case, mean over structures. Cases are ranked by the mean over the methods and named by alias.</p>
<ul class="key"><li>{{ contour("truth", "") }}truth, solid</li>
{% for name in structures %}<li>{{ contour("p" ~ loop.index0 % 4, "6 4") }}prediction of {{ name }}, dashed</li>{% endfor %}</ul>
<svg class="store" aria-hidden="true" width="0" height="0"><defs>{{ slices }}</defs></svg>
{% for block in overlays %}
<h3>{{ block.site }} <small class="aside">ranked by the mean Dice over methods, seed {{ block.seed }}</small></h3>
{% if block.alone %}<p class="about">Of the hospitals that trained alone, the model of {{ block.alone|join(" or ") }} is shown.</p>{% endif %}
<div class="cases{{ " across" if most_shown > 2 }}" style="--methods: {{ [most_shown, 6]|min }}">
{% for case in block.cases %}
<div class="case"><h4>{{ case.rank|capitalize }}<small>case {{ case.case }}, slice {{ case.z }}, mean Dice {{ case.mean }}</small></h4>
{% for group in case.groups %}
{% if not loop.first %}<details class="inner"><summary>{{ group.title }}</summary>{% endif %}
<div class="images">
{% for image in group.images %}<figure>
{% if image.drawing %}{{ image.drawing }}{% else %}<div class="absent">no picture of {{ image.method }} here</div>{% endif %}
<figcaption>{{ swatch(colours[image.method], false) }}{{ image.method }}{% if image.dice %} · Dice {{ image.dice }}{% endif %}</figcaption></figure>
{% endfor %}</div>
{% if not loop.first %}</details>{% endif %}
{% endfor %}</div>
{% endfor %}</div>
{% endfor %}
{% else %}
<p class="about">No overlay: pictures of patients stay at their hospital, and no hospital's folder lies on the machine that made this
page.</p>
{% endif %}
</section>
"""  # noqa: E501 - markup
