"""Style sheet of the report, part of the Jinja template: light and dark, wide and narrow, screen and paper."""

STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --ink: #1c2126; --muted: #59636e; --rule: #d3d9df; --panel: #f5f7f9;
  --accent: #005a8f; --good: #00664b; --good-ground: #e8f5f0; --warn: #7a4b00; --warn-ground: #fdf3e0; --bad: #9b2500;
  --bad-ground: #fceae4;
{%- for light, _ in palette %} --c{{ loop.index0 }}: {{ light }};{% endfor %} }
@media screen and (prefers-color-scheme: dark) { :root { --ground: #14181d; --ink: #e8ebee; --muted: #9ea8b3; --rule: #3a424b;
  --panel: #1c2229; --accent: #7cc4f2; --good: #7fd8b8; --good-ground: #16302a; --warn: #f3c677; --warn-ground: #33280f;
  --bad: #ffad94; --bad-ground: #3a1d15;
{%- for _, dark in palette %} --c{{ loop.index0 }}: {{ dark }};{% endfor %} } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1100px; margin: 0 auto; padding: 48px 32px 96px; }
h1, h2, h3, h4, p, dl, dd, figure, ul { margin: 0; }
h1 { font-size: 30px; line-height: 1.2; font-weight: 650; letter-spacing: -0.01em; }
h2 { font-size: 22px; line-height: 1.3; font-weight: 650; margin: 72px 0 10px; }
h3 { font-size: 17px; font-weight: 650; margin: 36px 0 10px; }
h4 { font-size: 15px; font-weight: 650; }
p.about, .notes { color: var(--muted); max-width: 78ch; }
p + p.about, p.about + p.about { margin-top: 8px; }
a { color: var(--accent); }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: 0.875em; }
.eyebrow { color: var(--muted); font-size: 14px; margin-bottom: 6px; }
.headline { font-size: 20px; line-height: 1.5; margin-top: 18px; max-width: 66ch; }
nav { margin-top: 22px; font-size: 14px; display: flex; flex-wrap: wrap; gap: 4px 20px; }
nav a { text-decoration: none; } nav a:hover { text-decoration: underline; }
.banner { margin-top: 24px; padding: 14px 18px; border-radius: 8px; border-left: 5px solid; }
.banner strong { margin-right: 6px; }
.banner.completed { background: var(--good-ground); border-color: var(--good); }
.banner.completed strong { color: var(--good); }
.banner.degraded, .banner.incomplete { background: var(--warn-ground); border-color: var(--warn); }
.banner.degraded strong, .banner.incomplete strong { color: var(--warn); }
.banner.failed { background: var(--bad-ground); border-color: var(--bad); } .banner.failed strong { color: var(--bad); }
.banner ul { margin-top: 8px; padding-left: 20px; font-size: 15px; }
.protocol { margin-top: 16px; padding: 22px 26px; background: var(--panel); border-radius: 10px; font-size: 15px;
  columns: 2; column-gap: 44px; }
.protocol div { break-inside: avoid; padding-bottom: 16px; } .protocol div:last-child { padding-bottom: 0; }
.protocol dt { font-weight: 650; font-size: 14px; } .protocol dd { color: var(--muted); overflow-wrap: anywhere; }
.stacked { margin-top: 14px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; line-height: 1.4; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--muted); font-size: 14px; padding-bottom: 10px; max-width: 90ch; }
th, td { text-align: left; padding: 7px 14px 7px 0; vertical-align: top; border-bottom: 1px solid var(--rule); }
thead th { border-bottom: 1.5px solid var(--muted); vertical-align: bottom; font-weight: 650; }
th small, td small { display: block; font-weight: 400; color: var(--muted); font-size: 12.5px; }
tbody th { font-weight: 400; white-space: nowrap; }
tr.group th { padding-top: 18px; font-weight: 650; white-space: normal; border-bottom: 0; }
tr.group small { display: inline; margin-left: 8px; }
td.missing { color: var(--muted); font-style: italic; }
td.best .value { font-weight: 700; }
.value { white-space: nowrap; }
.seeds { min-width: 178px; }
.aside { font-weight: 400; font-size: 14px; color: var(--muted); margin-left: 8px; }
.tag { font-size: 11px; font-weight: 600; letter-spacing: 0.02em; border: 1px solid currentColor; border-radius: 4px;
  padding: 0 4px; margin-left: 6px; vertical-align: 1px; color: var(--good); white-space: nowrap; }
.wide { overflow-x: auto; margin-top: 14px; } .wide table { min-width: 640px; } .wide table.stacked { min-width: 0; margin-top: 0; }
.stacked.paper { margin-bottom: 30px; } .paper .value + small.sd { display: inline; margin-left: 7px; white-space: nowrap; }
.paper b { font-weight: 750; } .paper tbody th { padding-right: 18px; }
tr.printed th, tr.printed td, tr.printed .value { color: var(--muted); } tr.printed .tag { color: var(--muted); font-weight: 400; }
.printed-notes { border-left: 3px solid var(--rule); padding: 2px 0 2px 14px; max-width: 90ch; } .printed-notes ul { padding-left: 18px; }
.tick { font-weight: 650; } .onlynarrow { display: none; }
.claims { margin: 14px 0 0; padding: 0; list-style: none; max-width: 96ch; }
.claims li { padding: 5px 0 5px 26px; position: relative; } .claims li::before { position: absolute; left: 2px; font-weight: 700; }
.claims .holds::before { content: "✓"; color: var(--good); } .claims .open::before { content: "○"; color: var(--muted); }
.claims .open { color: var(--muted); }
.panels.planes { grid-template-columns: repeat(2, minmax(0, 420px)); gap: 26px 60px; }
.panels.matrices { display: flex; flex-wrap: wrap; align-items: flex-end; gap: 26px 44px; }
.panels.matrices img { width: auto; max-width: 100%; } .matrices figcaption { max-width: 300px; }
h4.part { margin-top: 20px; }
.dense th { overflow-wrap: anywhere; } .dense th, .dense td { padding-right: 10px; }
.num { text-align: right; }
td.status-failed, td.status-interrupted, td.status-missing { color: var(--bad); } td.status-degraded { color: var(--warn); }
.notes { margin-top: 14px; font-size: 14px; padding-left: 18px; }
.key { display: flex; flex-wrap: wrap; gap: 6px 24px; font-size: 14px; margin: 14px 0 4px; padding: 0; list-style: none; }
.key li, .swatched { white-space: nowrap; }
.swatch { width: 30px; height: 14px; vertical-align: -2px; margin-right: 7px; overflow: visible; }
.swatch.small { width: 14px; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); gap: 26px 34px;
  margin-top: 14px; }
.panels.pairs { grid-template-columns: repeat(2, minmax(0, 480px)); gap: 26px 60px; }
.panels.single { grid-template-columns: minmax(0, 480px); }
.panels figcaption, .case figcaption { font-size: 14px; color: var(--muted); }
.panels figcaption b { color: var(--ink); font-weight: 650; }
.panels img { display: block; width: 100%; height: auto; }
.shares { font-size: 13px; color: var(--muted); }
.cases { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 28px; margin-top: 12px; }
.case h4 small { font-weight: 400; color: var(--muted); font-size: 13px; display: block; }
.case .images { display: grid; gap: 14px; margin-top: 8px; }
.cases.across { grid-template-columns: 1fr; }
.cases.across .images { grid-template-columns: repeat(var(--methods), minmax(0, 1fr)); }
.case figcaption { margin-top: 4px; }
.overlay { display: block; width: 100%; height: auto; border-radius: 6px; background: #000; }
.overlay path { fill: none; stroke-linejoin: round; }
.overlay .halo { stroke: #000; stroke-opacity: 0.4; stroke-width: 4; }
.overlay .truth, .overlay-key .truth { stroke: #ff5a47; } .overlay .truth { stroke-width: 2; }
.overlay .prediction { stroke-width: 2.4; stroke-dasharray: 7 5; }
.overlay .p0, .overlay-key .p0 { stroke: #2ee6a8; } .overlay .p1, .overlay-key .p1 { stroke: #6cc7ff; }
.overlay .p2, .overlay-key .p2 { stroke: #f0e442; } .overlay .p3, .overlay-key .p3 { stroke: #e79ac6; }
.store { position: absolute; }
.overlay-key { background: #3a3f45; border-radius: 4px; }
.absent { border: 1px dashed var(--rule); border-radius: 6px; aspect-ratio: 1; display: grid; place-items: center;
  color: var(--muted); font-size: 13px; padding: 12px; text-align: center; }
.case .inner { border: 0; margin-top: 8px; padding-top: 0; } .inner > summary { font-weight: 400; font-size: 14px; color: var(--muted); }
.interval .zero { stroke: var(--muted); stroke-width: 1; } .interval .bar { stroke: var(--c1); stroke-width: 3.2; }
.interval circle { fill: var(--c1); } .interval { display: block; margin-top: 2px; }
details { margin-top: 18px; border-top: 1px solid var(--rule); padding-top: 14px; }
summary { cursor: pointer; font-weight: 650; } details > :not(summary) { margin-top: 14px; }
pre { background: var(--panel); border-radius: 8px; padding: 14px 18px; overflow-x: auto; white-space: pre-wrap;
  overflow-wrap: anywhere; line-height: 1.5; }
.hash { overflow-wrap: anywhere; font-size: 12.5px; }
@media (max-width: 760px) {
  main { padding: 28px 18px 64px; } h1 { font-size: 25px; } h2 { margin-top: 52px; } .headline { font-size: 18px; }
  .protocol { columns: 1; padding: 18px; }
  .key li { white-space: normal; }
  .panels.pairs, .panels.single, .panels.planes { grid-template-columns: 1fr; } .onlynarrow { display: inline; }
  .cases { grid-template-columns: 1fr; } .case .images, .cases.across .images { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  table.stacked, .stacked tbody, .stacked tr, .stacked td, .stacked th, .stacked caption { display: block; }
  .stacked thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  .stacked tr { border-bottom: 1px solid var(--rule); padding: 10px 0; }
  .stacked tr.group { border: 0; padding: 14px 0 0; }
  .stacked th, .stacked td { border: 0; padding: 2px 0; }
  .stacked tbody th { font-weight: 650; }
  .stacked td { display: grid; grid-template-columns: 112px minmax(0, 1fr); }
  .stacked td::before { content: attr(data-label); color: var(--muted); font-size: 13px; font-weight: 400; }
  .stacked td > div { min-width: 0; }
}
@media print {
  body { font-size: 11pt; } main { max-width: none; padding: 0; } nav { display: none; }
  h2 { margin-top: 34px; } h2, h3, h4 { break-after: avoid; } tr, figure, .case, .banner, .protocol div { break-inside: avoid; }
  .banner, .protocol, pre, .overlay, .swatch { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
  .wide { overflow: visible; } .wide table { min-width: 0; } table { font-size: 9pt; } .panels { gap: 16px 20px; }
}
"""  # noqa: E501 - a sheet reads best with one rule a line
