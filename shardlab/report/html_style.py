"""The style of the page of an audit: light or dark as the reader's screen is, light on paper.

Colours are of parts that stand side by side in a bar: neighbours differ in lightness too, so that they are told apart
without the hue.
"""

STYLE = """\
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #14171c; --soft: #59626f; --line: #dfe3e8; --rest: #e9ecf0;
  --good: #0b7a4b; --good-back: #dff3e8; --bad: #b3261e; --bad-back: #fbe4e2; --plain: #46505d; --plain-back: #e9ecf0;
  --c0: #2563c9; --c1: #7a5af0; --c2: #c2559a; --c3: #e5732d; --c4: #18a07e; --c5: #e3ac1b; --c6: #d2433d;
  --c7: #8a94a2; --c8: #4b5563;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --page: #101317; --card: #191d23; --ink: #eceff3; --soft: #9aa4b1; --line: #2c333c; --rest: #2a3038;
    --good: #62d49b; --good-back: #12382a; --bad: #ff8f86; --bad-back: #47201e; --plain: #b3bcc8; --plain-back: #2a3038;
    --c0: #5b93f0; --c1: #a08bff; --c2: #de7fba; --c3: #f0894a; --c4: #35bb98; --c5: #e9bd45; --c6: #ef6a63;
    --c7: #7f8997; --c8: #bac3ce;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; padding: 28px 20px 48px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif;
  font-variant-numeric: tabular-nums; -webkit-print-color-adjust: exact; print-color-adjust: exact;
}
main { max-width: 1120px; margin: 0 auto; }
h1 { font-size: 30px; line-height: 1.2; margin: 0; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 0 0 4px; }
h3 { font-size: 14px; margin: 22px 0 6px; color: var(--soft); font-weight: 600; }
p { margin: 0 0 10px; overflow-wrap: anywhere; }
p:last-child { margin-bottom: 0; }
ul { margin: 0; padding-left: 20px; }
.note { margin: 10px 0 0; }
.soft { color: var(--soft); }
.title { display: flex; flex-wrap: wrap; gap: 10px 14px; align-items: center; margin-bottom: 8px; }
.pill { padding: 4px 14px; border-radius: 99px; font-weight: 700; font-size: 16px; white-space: nowrap; }
.good { color: var(--good); background: var(--good-back); }
.bad { color: var(--bad); background: var(--bad-back); }
.plain { color: var(--plain); background: var(--plain-back); }
.tiles { display: grid; grid-template-columns: repeat(4, 1fr); gap: 14px; margin: 18px 0 14px; }
.tile, section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
.tile { padding: 14px 16px; min-width: 0; }
.tile .name { color: var(--soft); font-size: 13px; }
.tile .value { font-size: 28px; font-weight: 700; line-height: 1.25; letter-spacing: -0.01em; }
.tile .value.words { font-size: 20px; line-height: 1.75; }
.tile .more { color: var(--soft); font-size: 13px; overflow-wrap: anywhere; }
section { padding: 18px 20px 20px; margin: 14px 0; }
.bar { display: flex; gap: 2px; height: 34px; border-radius: 7px; overflow: hidden; margin: 10px 0; }
.bar > span { display: block; height: 100%; min-width: 1px; overflow: hidden; color: #fff; font-size: 12px;
  line-height: 34px; text-align: center; white-space: nowrap; }
.bar > .free { color: var(--soft); background: var(--rest); }
@media screen and (prefers-color-scheme: dark) { .bar > span { color: #0d1014; } .bar > .free { color: var(--soft); } }
.meter { position: relative; height: 10px; border-radius: 5px; background: var(--rest); margin: 8px 0 6px; }
.meter > i { position: absolute; inset: 0 auto 0 0; border-radius: 5px; background: var(--good); }
.meter.over > i { background: var(--bad); }
.meter > b { position: absolute; top: -4px; bottom: -4px; width: 2px; background: var(--ink); }
.mark { position: relative; height: 18px; margin: -6px 0 8px; font-size: 12px; color: var(--bad); }
.mark > span { position: absolute; border-left: 2px solid var(--bad); padding-left: 5px; white-space: nowrap; }
.mark > span.left { border-left: 0; border-right: 2px solid var(--bad); padding: 0 5px 0 0; }
.legend { display: grid; grid-template-columns: repeat(auto-fill, minmax(310px, 1fr)); gap: 4px 24px; margin: 0;
  padding: 0; list-style: none; }
.legend li { display: flex; gap: 8px; align-items: baseline; }
.legend .of { margin-left: auto; white-space: nowrap; }
.legend .share { color: var(--soft); width: 4.2em; text-align: right; }
.swatch { flex: none; display: inline-block; width: 11px; height: 11px; border-radius: 3px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th { text-align: left; color: var(--soft); font-weight: 600; font-size: 12.5px; white-space: nowrap; }
th, td { padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); vertical-align: baseline; }
th:last-child, td:last-child { padding-right: 0; }
tr:last-child td { border-bottom: 0; }
.number { text-align: right; white-space: nowrap; }
.tight { white-space: nowrap; }
.long { overflow-wrap: anywhere; min-width: 14em; }
.wide { width: 42%; }
.length { width: 18%; min-width: 90px; }
.length > i { display: block; height: 9px; border-radius: 3px; background: var(--c0); min-width: 1px; }
code, pre { font: 12.5px/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { background: var(--page); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; overflow-x: auto;
  margin: 12px 0 0; }
.tag { display: inline-block; padding: 0 8px; border-radius: 5px; font-size: 12px; font-weight: 600;
  white-space: nowrap; color: var(--plain); background: var(--plain-back); }
.tag.waits { color: var(--bad); background: var(--bad-back); }
.tag.beside { color: var(--good); background: var(--good-back); }
.finding { border-left: 3px solid var(--c5); padding: 2px 0 2px 14px; margin: 14px 0 0; break-inside: avoid; }
.finding p { margin: 2px 0; }
svg { display: block; width: 100%; height: auto; overflow: visible; margin: 12px 0 8px; }
svg text { font-size: 10px; fill: #fff; text-anchor: middle; dominant-baseline: central; }
svg .row { fill: var(--soft); text-anchor: start; font-size: 12px; }
svg .idle { fill: var(--rest); }
svg .F { fill: var(--c0); } svg .B { fill: var(--c3); } svg .I { fill: var(--c5); } svg .W { fill: var(--c4); }
@media screen and (prefers-color-scheme: dark) { svg text { fill: #0d1014; } }
@media (max-width: 860px) {
  body { padding: 18px 12px 32px; }
  h1 { font-size: 24px; }
  .tiles { grid-template-columns: repeat(2, 1fr); }
  svg text { display: none; } svg .row { display: block; font-size: 16px; }
  section { padding: 14px 14px 16px; }
  th, td { padding-right: 10px; }
  .length { display: none; }
  .long { min-width: 9em; }
}
@page { margin: 12mm; }
@media print {
  body { padding: 0; background: #fff; font-size: 12px; }
  h1 { font-size: 22px; } h2 { font-size: 15px; } h3 { font-size: 12px; }
  .tile .value { font-size: 20px; } .tile .name, .tile .more, table, th { font-size: 11px; }
  code, pre, .tag { font-size: 10px; }
  main { max-width: none; }
  .tiles { grid-template-columns: repeat(4, 1fr); }
  .tile, section { border-radius: 6px; }
  section { padding: 12px 14px; }
  .tile, .finding, .bar, .legend, svg, tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .scroll, pre { overflow: visible; }
  pre { white-space: pre-wrap; }
}
"""
