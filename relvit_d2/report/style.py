"""The look of the report page: light and dark, wide and narrow, screen and paper."""

# Lines of charts: Okabe and Ito's colours (2008), told apart with every common form of colour blindness; lighter in the
# dark where the contrast wants it.
STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --paper: #fff; --rule: #d1d9e0; --tint: #f2f5f8;
  --mark: #fff3c4; --fill: #9ecae9; --right: #a8ddb5;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #cc79a7; --c4: #b8860b; --c5: #56b4e9; --c6: #6b4fbb; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9aa6b2; --paper: #0f1419; --rule: #323b46;
  --tint: #1a212a; --mark: #4d4318; --fill: #1f4f77; --right: #1d5a3a;
  --c0: #4da3e0; --c1: #f0883e; --c2: #3fbf94; --c3: #e39bc4; --c4: #e3b341; --c5: #8fd0ff; --c6: #a990f0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "DejaVu Sans", sans-serif; overflow-wrap: break-word; }
header, main { max-width: 1200px; margin: 0 auto; padding: 0 20px; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 24px 0 8px; }
h2 { font-size: 1.25rem; margin: 40px 0 12px; border-bottom: 1px solid var(--rule); padding-bottom: 4px; }
h3 { font-size: 1.05rem; margin: 24px 0 8px; }
p, figcaption { color: var(--soft); margin: 8px 0; font-size: .9rem; }
.verdict { margin: 8px 0; padding-left: 20px; }
nav { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 16px 0; font-size: .9rem; }
a { color: var(--c0); }
code { font: .85em ui-monospace, SFMono-Regular, Menlo, "DejaVu Sans Mono", monospace; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; min-width: min(100%, 320px); }
th, td { padding: 5px 12px; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top; }
thead th { border-bottom: 2px solid var(--rule); }
tbody th { font-weight: 500; white-space: nowrap; }
td { min-width: 4ch; max-width: 60ch; }
.numbers td, .numbers thead th + th { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.differs { background: var(--mark); padding: 0 3px; }
.difference { color: var(--soft); }
.bar { display: block; min-width: 90px; padding: 0 4px;
  background: linear-gradient(var(--fill), var(--fill)) no-repeat 0 0 / var(--share) 100%; }
.cell { display: block; min-width: 2.5ch; padding: 0 3px;
  background: color-mix(in srgb, var(--c1) calc(var(--share) * .8), transparent); }
.cell.right { background: color-mix(in srgb, var(--right) var(--share), transparent); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: 16px; }
.chart { width: 100%; height: auto; display: block; }
.chart text { fill: var(--ink); font-size: 14px; }
.chart .tick { fill: var(--soft); font-size: 12px; }
.chart .grid { stroke: var(--rule); stroke-width: 1; }
polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
.dashed { stroke-dasharray: 6 4; stroke-width: 1.5; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; }
.key svg { width: 22px; height: 8px; margin-right: 6px; }
figure { margin: 8px 0; }
img { max-width: 100%; height: auto; border: 1px solid var(--rule); }
details { margin: 8px 0; }
summary { cursor: pointer; color: var(--c0); }
@media (max-width: 600px) { header, main { padding: 0 12px; } h1 { font-size: 1.25rem; } th, td { padding: 4px 8px; }
  td { max-width: 34ch; } }
@media print { :root { color-scheme: light; } nav { display: none; } body { font-size: 11pt; }
  figure, .chart, tr, .numbers { break-inside: avoid; } h2, h3 { break-after: avoid; } .scroll { overflow: visible; } }
""" + "".join(f".c{i} {{ stroke: var(--c{i}); }} circle.c{i} {{ fill: var(--c{i}); }}\n" for i in range(7))
