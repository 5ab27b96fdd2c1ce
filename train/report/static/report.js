/* The charts and the table of lots. Texts of the data reach the page as text nodes alone. */
'use strict';
(function () {
  var LWC = window.LightweightCharts, Lots = window.PerpjaxLots;
  var DASH = '\u2013', MINUS = '\u2212', PAGE = 50, PAD = 12;
  var REASONS = { stopped: 'stop', target: 'target', liquidated: 'liquidation', closed: 'closed',
    timed_out: 'time limit', open: 'still open' };
  var data = JSON.parse(document.getElementById('data').textContent);
  var charts = [], repaint = [];
  var shared = window.perpjaxReport = { ready: false, data: data, charts: {} };

  function $(id) { return document.getElementById(id); }

  function make(name, text, given) {
    var node = document.createElement(name);
    if (text !== undefined && text !== null) node.textContent = clean(text);
    Object.keys(given || {}).forEach(function (key) { node.setAttribute(key, given[key]); });
    return node;
  }

  /* Characters that do not print are shown by their codes, as in the rest of the page. */
  function clean(text) {
    return String(text).replace(/[\p{C}\p{Zl}\p{Zp}]/gu, function (c) { return '\\u' + c.codePointAt(0).toString(16).padStart(4, '0'); });
  }

  function clear(node) { while (node.firstChild) node.removeChild(node.firstChild); return node; }

  function fail(error) {
    var box = $('faults');
    box.hidden = false;
    var line = document.createElement('p');
    line.textContent = 'A part of this page failed: ' + (error && error.stack || error);
    box.appendChild(line);
  }
  window.addEventListener('error', function (event) { fail(event.error || event.message); });
  window.addEventListener('unhandledrejection', function (event) { fail(event.reason); });

  /* Numbers. */

  function number(x, places, sign) {
    if (typeof x !== 'number' || !isFinite(x)) return DASH;
    var text = Math.abs(x).toLocaleString('en-US', { minimumFractionDigits: places, maximumFractionDigits: places });
    var zero = !/[1-9]/.test(text);
    return (zero ? '' : x < 0 ? MINUS : sign ? '+' : '') + text;
  }
  function percent(x, places) { return number(100 * x, places === undefined ? 2 : places, true) + ' %'; }
  function stamp(seconds) {
    return isFinite(seconds) ? new Date(1000 * seconds).toISOString().replace('T', ' ').slice(0, 16) : DASH;
  }
  function tone(x) { return x > 0 ? 'gain' : x < 0 ? 'loss' : ''; }

  /* The packed columns; the counterpart of train/report/encode.py. */

  async function inflate(text) {
    var raw = atob(text), bytes = new Uint8Array(raw.length);
    for (var i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
    var stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('deflate'));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  function unpack(column, bytes) {
    var n = column.n, out = new Float64Array(n), weight = 1, sum = 0, i;
    for (var k = 0; k < column.p; k++, weight *= 256) {
      for (i = 0; i < n; i++) out[i] += bytes[column.o + k * n + i] * weight;
    }
    for (i = 0; i < n; i++) {
      var half = Math.floor(out[i] / 2), x = out[i] % 2 ? -half - 1 : half;
      if (column.d) x = sum += x;
      out[i] = x / column.s;
    }
    if (column.m) for (i = 0; i < n; i++) if (bytes[column.o + column.p * n + i]) out[i] = NaN;
    return column.w ? Array.from(out, function (j) { return column.w[j]; }) : out;
  }

  function unpackCandles(packed, bytes) {
    var parts = packed.parts.map(function (c) { return unpack(c, bytes); }), close = parts[0], n = close.length, s = packed.scale;
    var out = { open: new Float64Array(n), high: new Float64Array(n), low: new Float64Array(n), close: new Float64Array(n) };
    for (var i = 0; i < n; i++) {
      var before = i && isFinite(close[i - 1]) ? close[i - 1] : 0, open = parts[1][i] + before;
      out.open[i] = open / s; out.close[i] = close[i] / s;
      out.high[i] = (parts[2][i] + Math.max(open, close[i])) / s;
      out.low[i] = (Math.min(open, close[i]) - parts[3][i]) / s;
    }
    return out;
  }

  function unpackAccount(packed, bytes) {
    var account = { name: packed.name, symbol: packed.symbol, length: packed.length };
    ['time', 'equity', 'notional'].forEach(function (name) { account[name] = unpack(packed[name], bytes); });
    account.bars = unpackCandles(packed.bars, bytes);
    account.lots = {};
    Object.keys(packed.lots).forEach(function (name) { account.lots[name] = unpack(packed.lots[name], bytes); });
    order(account.lots);
    // Costs are amounts in the file; here, as in the waterfall, they are losses.
    ['slippage', 'gap_losses', 'fees', 'funding', 'forfeited'].forEach(function (name) {
      account.lots[name] = account.lots[name].map(function (x) { return -x; });
    });
    account.lots.last = Array.from(account.bars.close).reverse().find(isFinite);
    account.lots.reasonText = function (k) { return REASONS[account.lots.reason[k]] || account.lots.reason[k]; };
    account.precision = packed.bars.scale > 1 ? Math.min(8, Math.round(Math.log10(packed.bars.scale))) : 0;
    if (packed.short) {
      var bars = unpack(packed.short.bar, bytes), at = new Int32Array(account.time.length).fill(-1);
      for (var i = 0; i < bars.length; i++) at[bars[i]] = i * packed.short.each;
      account.short = { at: at, each: packed.short.each, prices: unpackCandles(packed.short.prices, bytes), all: packed.short.all };
    }
    return account;
  }

  /* Sort the lots by their entries. */
  function order(lots) {
    var rank = Array.from(lots.id, function (_, i) { return i; });
    rank.sort(function (a, b) { return lots.entry_time[a] - lots.entry_time[b] || lots.id[a] - lots.id[b]; });
    Object.keys(lots).forEach(function (name) {
      var from = lots[name];
      lots[name] = Array.isArray(from) ? rank.map(function (i) { return from[i]; }) : Float64Array.from(rank, function (i) { return from[i]; });
    });
  }

  /* Colours and charts. */

  function color(name) { return getComputedStyle(document.documentElement).getPropertyValue('--' + name).trim(); }

  function look() {
    return {
      layout: { background: { type: 'solid', color: color('card') }, textColor: color('soft'), fontSize: 11,
        fontFamily: 'system-ui, -apple-system, "Segoe UI", Roboto, sans-serif',
        panes: { separatorColor: color('line'), separatorHoverColor: color('faint') } },
      grid: { vertLines: { color: color('faint') }, horzLines: { color: color('faint') } },
      rightPriceScale: { borderColor: color('line') }, timeScale: { borderColor: color('line') },
      crosshair: { vertLine: { color: color('soft') }, horzLine: { color: color('soft') } }
    };
  }

  function createChart(name, wide) {
    var place = clear($(name));
    var chart = LWC.createChart(place, Object.assign({ autoSize: true, localization: { locale: 'en-GB' } }, look()));
    chart.applyOptions({
      layout: { attributionLogo: name === 'candles' },
      timeScale: { timeVisible: !!wide, secondsVisible: false, minBarSpacing: 0.005, enableConflation: true, rightOffset: 2 },
      handleScroll: { mouseWheel: false, vertTouchDrag: false }, handleScale: { mouseWheel: name === 'candles' }
    });
    charts.push(chart);
    shared.charts[name] = chart;
    return chart;
  }

  function paintWith(change) { change(); repaint.push(change); }

  function paint() {
    charts.forEach(function (chart) { chart.applyOptions(look()); });
    repaint.forEach(function (change) { change(); });
  }

  function namePane(place, text, top) {
    var node = make('span', text, { class: 'pane-name' });
    node.style.top = top;
    place.appendChild(node);
  }

  function none(name, text) { clear($(name)).appendChild(make('p', text, { class: 'empty' })); $(name).style.height = 'auto'; }

  function grow(daily) {
    var points = [], fall = [], value = 1, peak = 1, dates = daily.dates || [], returns = daily.returns || [];
    for (var i = 0; i < Math.min(dates.length, returns.length); i++) {
      value *= 1 + (returns[i] || 0); peak = Math.max(peak, value);
      points.push({ time: dates[i], value: 100 * (value - 1) });
      fall.push({ time: dates[i], value: 100 * (value / peak - 1) });
    }
    return { points: points, fall: fall };
  }

  /* Curves of returns by day, with their drawdowns below. */
  function drawDaily(curves) {
    curves = curves.filter(function (c) { return c.grown.points.length; });
    if (!curves.length) return none('daily', 'There are no daily returns.');
    var place = $('daily'), chart = createChart('daily'), legend = make('div', null, { class: 'series' });
    var form = { type: 'custom', minMove: 0.01, formatter: function (x) { return number(x, 2, true) + ' %'; } };
    curves.slice().reverse().forEach(function (curve) {
      var given = { priceFormat: form, lineWidth: curve.lead ? 3 : 1.5, lineStyle: curve.style || 0, priceLineVisible: false,
        lastValueVisible: !!curve.lead || curves.length < 4, crosshairMarkerRadius: 3 };
      var upper = chart.addSeries(LWC.LineSeries, given, 0);
      var lower = chart.addSeries(LWC.LineSeries, Object.assign({}, given, { lineWidth: curve.lead ? 2 : 1, lastValueVisible: false }), 1);
      upper.setData(curve.grown.points); lower.setData(curve.grown.fall);
      paintWith(function () { upper.applyOptions({ color: color(curve.color) }); lower.applyOptions({ color: color(curve.color) }); });
      curve.series = [upper, lower];
    });
    curves.forEach(function (curve) {
      var button = make('button', null, { type: 'button', 'aria-pressed': 'true', title: 'Show or hide' });
      button.appendChild(sample(curve));
      button.appendChild(document.createTextNode(clean(curve.name)));
      button.appendChild(curve.at = make('span', '', { class: 'at' }));
      button.addEventListener('click', function () {
        var on = button.getAttribute('aria-pressed') !== 'true';
        button.setAttribute('aria-pressed', String(on));
        curve.series.forEach(function (s) { s.applyOptions({ visible: on }); });
      });
      legend.appendChild(button);
    });
    var day = legend.appendChild(make('span', '', { class: 'day' }));
    place.parentNode.insertBefore(legend, place);
    // The values at the cross hair; the last ones without it.
    function tell(event) {
      day.textContent = event && event.time ? String(event.time) : '';
      curves.forEach(function (curve) {
        var found = event && event.time ? event.seriesData.get(curve.series[0]) : curve.grown.points[curve.grown.points.length - 1];
        curve.at.textContent = found ? number(found.value, 2, true) + ' %' : '';
      });
    }
    chart.subscribeCrosshairMove(tell);
    tell();
    chart.panes()[0].setStretchFactor(0.68); chart.panes()[1].setStretchFactor(0.32);
    curves[0].series[1].priceScale().applyOptions({ scaleMargins: { top: 0.22, bottom: 0.06 } });
    namePane(place, 'return, %', '4px'); namePane(place, 'drawdown, %', '66%');
    chart.timeScale().fitContent();
  }

  function sample(curve) {
    var space = 'http://www.w3.org/2000/svg', svg = document.createElementNS(space, 'svg'), line = document.createElementNS(space, 'line');
    svg.setAttribute('width', 20); svg.setAttribute('height', 10); svg.setAttribute('aria-hidden', 'true');
    [['x1', 0], ['x2', 20], ['y1', 5], ['y2', 5], ['stroke-width', curve.lead ? 3 : 2],
      ['stroke-dasharray', ['', '2 2', '5 3', '8 3', '2 4'][curve.style || 0]]].forEach(function (p) { line.setAttribute(p[0], p[1]); });
    line.style.stroke = 'var(--' + curve.color + ')';
    svg.appendChild(line);
    return svg;
  }

  function ownCurves(record) {
    var daily = record.daily || {}, found = [{ name: 'policy', lead: true, color: 'accent', grown: grow(daily) }];
    var shades = ['run-1', 'run-3', 'run-4', 'run-5', 'run-6', 'run-2'];
    (Array.isArray(record.baselines) ? record.baselines : []).forEach(function (one, i) {
      found.push({ name: String(one.title || one.name), color: shades[i % shades.length], style: i % 5,
        grown: grow({ dates: daily.dates, returns: one.daily }) });
    });
    return found;
  }

  /* One account by bar. */
  function drawAccount(accounts) {
    if (!accounts.length) return none('account', 'There is no account.');
    var place = $('account'), chart = createChart('account', true);
    var equity = chart.addSeries(LWC.LineSeries, { lineWidth: 2, priceLineVisible: false,
      priceFormat: { type: 'custom', minMove: 0.01, formatter: function (x) { return number(x, 2); } } }, 0);
    var exposure = chart.addSeries(LWC.BaselineSeries, { baseValue: { type: 'price', price: 0 }, lineWidth: 1, priceLineVisible: false,
      priceFormat: { type: 'custom', minMove: 0.001, formatter: function (x) { return number(x, 2) + ' ×'; } } }, 1);
    paintWith(function () {
      equity.applyOptions({ color: color('accent') });
      exposure.applyOptions({ topLineColor: color('gain'), topFillColor1: color('gain-soft'), topFillColor2: color('gain-soft'),
        bottomLineColor: color('loss'), bottomFillColor1: color('loss-soft'), bottomFillColor2: color('loss-soft') });
    });
    chart.panes()[0].setStretchFactor(0.65); chart.panes()[1].setStretchFactor(0.35);
    namePane(place, 'equity, quote', '4px'); namePane(place, 'notional / equity', '63%');
    function show(index) {
      var account = accounts[index], upper = [], lower = [];
      for (var i = 0; i < account.time.length; i++) {
        var share = account.equity[i] > 0 ? account.notional[i] / account.equity[i] : NaN;
        upper.push({ time: account.time[i], value: account.equity[i] });
        lower.push(isFinite(share) ? { time: account.time[i], value: share } : { time: account.time[i] });
      }
      equity.setData(upper); exposure.setData(lower);
      chart.timeScale().fitContent();
    }
    choose('account-of', accounts, show);
    show(0);
  }

  function choose(name, accounts, show) {
    var select = $(name);
    accounts.forEach(function (account, i) { select.appendChild(make('option', account.name, { value: i })); });
    select.parentNode.hidden = accounts.length < 2;
    select.addEventListener('change', function () { show(Number(select.value)); });
  }

  /* Candles and lots. */

  var view = { account: 0, lot: -1, span: null };

  function drawLots(accounts) {
    if (!accounts.length) return none('candles', 'There is no account.');
    var chart = createChart('candles', true), primitive = new Lots();
    var candles = chart.addSeries(LWC.CandlestickSeries, { priceLineVisible: false, lastValueVisible: false, borderVisible: true });
    candles.attachPrimitive(primitive);
    paintWith(function () {
      candles.applyOptions({ upColor: color('card'), downColor: color('plain'), borderUpColor: color('plain'),
        borderDownColor: color('plain'), wickUpColor: color('plain'), wickDownColor: color('plain') });
      ['gain', 'loss', 'accent', 'ink', 'soft', 'card'].forEach(function (name) { primitive.colors[name] = color(name); });
      primitive.redraw();
    });
    shared.primitive = primitive;
    var quote = make('span', '', { class: 'pane-name' });
    quote.style.top = '4px';
    $('candles').appendChild(quote);
    chart.subscribeCrosshairMove(function (event) {
      var c = event.time && event.seriesData.get(candles), places = accounts[view.account].precision;
      quote.textContent = c && c.close !== undefined ? stamp(event.time) + ' UTC   O ' + number(c.open, places) + '   H ' +
        number(c.high, places) + '   L ' + number(c.low, places) + '   C ' + number(c.close, places) : '';
    });
    accounts.forEach(function (account) {
      account.points = Array.from(account.time, function (time, i) { return point(time, account.bars, i); });
    });
    if (accounts.some(function (a) { return a.short && !a.short.all; })) {
      $('short-note').textContent = 'Some short candles are left out, to keep the page small: those in the middle of long lots, or of small lots.';
    } else if (accounts.some(function (a) { return a.short; })) {
      var minutes = accounts[0].length / 60;
      $('short-note').textContent = 'Candles of ' + number(minutes, 0) + ' minutes; around the chosen lot of ' +
        number(minutes / accounts[0].short.each, 0) + '.';
    }

    function point(time, prices, i) {
      return isFinite(prices.close[i]) ? { time: time, open: prices.open[i], high: prices.high[i], low: prices.low[i], close: prices.close[i] } : { time: time };
    }

    function barOf(account, time) { return Math.max(Lots.lowerBound(account.time, time + 0.5) - 1, 0); }

    function lastBar(account, k) {
      var time = account.lots.exit_time[k];
      return isFinite(time) ? barOf(account, time) : account.time.length - 1;
    }

    /* The bars of the account, the short candles in the place of those around the chosen lot. */
    function load() {
      var account = accounts[view.account], k = view.lot, points = account.points;
      if (k >= 0 && account.short) {
        var first = Math.max(barOf(account, account.lots.entry_time[k]) - PAD, 0);
        var last = Math.min(lastBar(account, k) + PAD, account.time.length - 1), fine = [];
        for (var bar = first; bar <= last; bar++) {
          var at = account.short.at[bar];
          if (at < 0) { fine.push(points[bar]); continue; }
          for (var j = 0; j < account.short.each; j++) {
            fine.push(point(account.time[bar] + j * account.length / account.short.each, account.short.prices, at + j));
          }
        }
        points = points.slice(0, first).concat(fine, points.slice(last + 1));
      }
      var times = Float64Array.from(points, function (p) { return p.time; });
      var lots = account.lots, from = new Float64Array(lots.id.length), to = new Float64Array(lots.id.length);
      function indexOf(time) { return Math.max(Lots.lowerBound(times, time + 0.5) - 1, 0); }
      for (var i = 0; i < from.length; i++) {
        from[i] = indexOf(lots.entry_time[i]);
        to[i] = isFinite(lots.exit_time[i]) ? indexOf(lots.exit_time[i]) : times.length - 1;
      }
      candles.applyOptions({ priceFormat: { type: 'custom', minMove: Math.pow(10, -account.precision),
        formatter: function (x) { return number(x, account.precision); } } });
      candles.setData(points);
      primitive.selected = k;
      primitive.set(lots, from, to);
    }

    function zoom() {
      if (view.lot < 0) return chart.timeScale().fitContent();
      var from = primitive.from[view.lot], to = primitive.to[view.lot], pad = Math.max(20, 0.35 * (to - from));
      chart.timeScale().setVisibleLogicalRange({ from: from - pad, to: to + pad });
      chart.priceScale('right').applyOptions({ autoScale: true });
    }

    function select(index, k, scroll) {
      var account = accounts[index], moved = index !== view.account;
      view.account = index; view.lot = account.lots.id.length ? Math.max(-1, Math.min(k, account.lots.id.length - 1)) : -1;
      $('lots-of').value = String(index);
      load(); zoom(); tell();
      if (moved) table.load(index);
      table.mark(view.lot, scroll);
    }

    function tell() {
      var account = accounts[view.account], lots = account.lots, k = view.lot, box = clear($('lot')), count = lots.id.length;
      $('at-lot').textContent = count ? (k < 0 ? number(count, 0) + ' lots' : number(k + 1, 0) + ' of ' + number(count, 0)) : 'no lot was opened';
      ['first-lot', 'previous-lot', 'next-lot', 'last-lot', 'follow-lot'].forEach(function (id) { $(id).disabled = !count; });
      if (k < 0) {
        box.appendChild(make('dt', count ? 'Choose a lot: by the arrows above, by a click on it, or by its row below.' : 'There is no lot.', { class: 'hint' }));
        return;
      }
      box.appendChild(make('dt', 'Lot ' + lots.id[k] + ', ' + lots.side[k] + ' ' + account.symbol, { class: 'head' }));
      [['entry', stamp(lots.entry_time[k])], ['at', price(lots.entry_price[k])], ['exit', stamp(lots.exit_time[k])],
        ['at', price(lots.exit_price[k])], ['by', lots.reasonText(k)], ['bars held', number(lots.bars[k], 0)],
        ['leverage', number(lots.leverage[k], 1) + ' ×'], ['margin', number(lots.margin[k], 2)],
        ['notional', number(lots.notional[k], 2)], ['stop', price(lots.stop[k])], ['target', price(lots.target[k])],
        ['liquidation', price(lots.liquidation[k])], ['worst, best', percent(lots.worst[k]) + ', ' + percent(lots.best[k])],
        ['gross', number(lots.gross[k], 2, true)], ['slippage', number(lots.slippage[k], 2, true)],
        ['gap losses', number(lots.gap_losses[k], 2, true)], ['fees', number(lots.fees[k], 2, true)],
        ['funding', number(lots.funding[k], 2, true)], ['forfeited', number(lots.forfeited[k], 2, true)],
        ['forgiven', number(lots.forgiven[k], 2, true)], ['net', number(lots.net[k], 2, true), tone(lots.net[k])]
      ].forEach(function (row) {
        box.appendChild(make('dt', row[0]));
        box.appendChild(make('dd', row[1], { class: row[2] || '' }));
      });

      function price(x) { return number(x, account.precision); }
    }

    function go(step) { select(view.account, view.lot < 0 ? (step > 0 ? 0 : Infinity) : Math.max(view.lot + step, 0), false); }
    function all() { view.lot = -1; load(); zoom(); tell(); table.mark(-1); }
    var actions = { 'first-lot': function () { select(view.account, 0); }, 'last-lot': function () { select(view.account, Infinity); },
      'previous-lot': function () { go(-1); }, 'next-lot': function () { go(1); }, 'all-lots': all,
      'follow-lot': function () { if (view.lot < 0) go(1); else zoom(); } };
    Object.keys(actions).forEach(function (id) { $(id).addEventListener('click', actions[id]); });
    var keys = { n: 'next-lot', p: 'previous-lot', a: 'all-lots', z: 'follow-lot' };
    var arrows = { ArrowRight: 'next-lot', ArrowLeft: 'previous-lot', Home: 'first-lot', End: 'last-lot' };
    document.addEventListener('keydown', function (event) {
      if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
      var inside = $('candles').contains(event.target), id = keys[event.key] || (inside && arrows[event.key]);
      if (!id) return;
      event.preventDefault();
      actions[id]();
    });
    chart.subscribeClick(function (event) {
      if (!event.point) return;
      var k = primitive.nearest(event.point.x, event.point.y);
      if (k >= 0) select(view.account, k);
    });
    var table = makeTable(accounts, function (index, k) { select(index, k); $('candles').scrollIntoView({ block: 'nearest' }); });
    choose('lots-of', accounts, function (index) { view.account = index; table.load(index); all(); });
    table.load(0);
    var count = accounts[0].points.length;
    load(); tell();
    if (count > 1500) chart.timeScale().setVisibleLogicalRange({ from: count - 600, to: count + 2 }); else zoom();
    shared.select = select;
    return select;
  }

  /* The table of lots: one page of rows at a time. */
  function makeTable(accounts, open) {
    var table = $('lots'), columns = [
      ['lot', 'id', 0], ['side', 'side'], ['entry', 'entry_time'], ['price', 'entry_price'], ['exit', 'exit_time'], ['price', 'exit_price'],
      ['by', 'reason'], ['bars', 'bars', 0], ['leverage', 'leverage', 1], ['notional', 'notional', 0], ['worst', 'worst'], ['best', 'best'],
      ['gross', 'gross', 2], ['costs', 'costs', 2], ['funding', 'funding', 2], ['net', 'net', 2]
    ];
    var state = { account: 0, rows: [], page: 0, sort: 0, down: false, marked: -1 };
    var head = make('tr'), body = make('tbody'), top = make('thead');
    columns.forEach(function (column, i) {
      var cell = make('th', null, { scope: 'col' }), button = make('button', column[0], { type: 'button', title: 'Sort by ' + column[0] });
      button.addEventListener('click', function () {
        state.down = state.sort === i ? !state.down : i > 6; state.sort = i; state.page = 0; arrange();
      });
      cell.appendChild(button); head.appendChild(cell);
    });
    top.appendChild(head); table.appendChild(make('caption', 'Lots')); table.appendChild(top); table.appendChild(body);
    fill('filter-side', [['', 'all'], ['long', 'long'], ['short', 'short']]);
    fill('filter-reason', [['', 'all']].concat(Object.keys(REASONS).map(function (r) { return [r, REASONS[r]]; })));
    fill('filter-net', [['', 'all'], ['gain', 'gains'], ['loss', 'losses']]);
    $('page-back').addEventListener('click', function () { state.page--; show(); });
    $('page-on').addEventListener('click', function () { state.page++; show(); });

    function fill(id, options) {
      options.forEach(function (o) { $(id).appendChild(make('option', o[1], { value: o[0] })); });
      $(id).addEventListener('change', function () { state.page = 0; arrange(); });
    }

    function arrange() {
      var lots = accounts[state.account].lots, side = $('filter-side').value, reason = $('filter-reason').value, net = $('filter-net').value;
      var values = lots[columns[state.sort][1]], rows = [];
      for (var k = 0; k < lots.id.length; k++) {
        if (side && lots.side[k] !== side || reason && lots.reason[k] !== reason) continue;
        if (net && (net === 'gain') !== lots.net[k] > 0) continue;
        rows.push(k);
      }
      var turn = state.down ? -1 : 1;
      rows.sort(function (a, b) {
        var x = values[a], y = values[b];
        if (x !== x || y !== y) return (x !== x) - (y !== y); // missing values stand last
        return (x < y ? -1 : x > y ? 1 : 0) * turn || a - b;
      });
      state.rows = rows;
      Array.from(head.children).forEach(function (cell, i) {
        if (i === state.sort) cell.setAttribute('aria-sort', state.down ? 'descending' : 'ascending'); else cell.removeAttribute('aria-sort');
        cell.firstChild.textContent = columns[i][0] + (i === state.sort ? (state.down ? ' ↓' : ' ↑') : '');
      });
      show();
    }

    function show() {
      var pages = Math.max(1, Math.ceil(state.rows.length / PAGE));
      state.page = Math.max(0, Math.min(state.page, pages - 1));
      var first = state.page * PAGE, account = accounts[state.account];
      clear(body);
      state.rows.slice(first, first + PAGE).forEach(function (k) { body.appendChild(row(account, k)); });
      if (!state.rows.length) {
        var line = make('tr');
        line.appendChild(make('td', account.lots.id.length ? 'No lot fits the filters.' : 'No lot was opened.', { colspan: columns.length, class: 'empty' }));
        body.appendChild(line);
      }
      $('page-at').textContent = state.rows.length ? number(first + 1, 0) + ' to ' + number(Math.min(first + PAGE, state.rows.length), 0) + ' of ' + number(state.rows.length, 0) : '0 lots';
      $('page-back').disabled = !state.page; $('page-on').disabled = state.page >= pages - 1;
    }

    function row(account, k) {
      var line = make('tr', null, { tabindex: 0, 'data-lot': k, 'aria-selected': String(k === state.marked) });
      columns.forEach(function (column) { line.appendChild(cellOf(account, column, k)); });
      line.addEventListener('click', function () { open(state.account, k); });
      line.addEventListener('keydown', function (event) {
        if (event.key === 'Enter' || event.key === ' ') { event.preventDefault(); open(state.account, k); }
        var other = event.key === 'ArrowDown' ? line.nextSibling : event.key === 'ArrowUp' ? line.previousSibling : null;
        if (other) { event.preventDefault(); other.focus(); }
      });
      return line;
    }

    function cellOf(account, column, k) {
      var name = column[1], x = account.lots[name][k];
      if (name === 'id') return make('th', String(x), { scope: 'row' });
      if (name === 'side') return make('td', (x === 'long' ? '▲ ' : x === 'short' ? '▼ ' : '') + x);
      if (name === 'reason') return make('td', account.lots.reasonText(k));
      if (/_time$/.test(name)) return make('td', stamp(x));
      if (/_price$/.test(name)) return make('td', number(x, account.precision));
      if (name === 'worst' || name === 'best') return make('td', percent(x));
      var money = /^(gross|costs|funding|net)$/.test(name);
      return make('td', number(x, column[2], money), name === 'net' ? { class: tone(x) } : {});
    }

    return {
      load: function (index) { state.account = index; state.page = 0; state.marked = -1; arrange(); },
      mark: function (k) {
        state.marked = k;
        var at = state.rows.indexOf(k);
        if (at >= 0 && Math.floor(at / PAGE) !== state.page) { state.page = Math.floor(at / PAGE); show(); }
        Array.from(body.children).forEach(function (line) { line.setAttribute('aria-selected', String(line.dataset.lot === String(k))); });
      }
    };
  }

  /* Holding time against profit, on a canvas of its own. */
  function drawScatter(accounts, select) {
    var points = [];
    accounts.forEach(function (account, a) {
      for (var k = 0; k < account.lots.id.length; k++) {
        if (isFinite(account.lots.net[k])) points.push({ a: a, k: k, bars: Math.max(account.lots.bars[k], 1), net: account.lots.net[k] });
      }
    });
    if (!points.length) return none('scatter', 'No lot was opened.');
    var place = clear($('scatter')), canvas = make('canvas', null, { role: 'img', 'aria-label': 'Bars held against net of each lot' });
    place.appendChild(canvas);
    var most = points.reduce(function (m, p) { return Math.max(m, p.bars); }, 2);
    var nets = points.map(function (p) { return p.net; }), low = Math.min(0, nets.reduce(function (m, x) { return Math.min(m, x); }, 0));
    var high = nets.reduce(function (m, x) { return Math.max(m, x); }, 0), room = (high - low || 1) * 0.06, box = {};
    low -= room; high += room;

    function X(bars) { return box.left + (box.width - box.left - 10) * Math.log(bars) / Math.log(most); }
    function Y(net) { return 14 + (box.height - 44) * (high - net) / (high - low); }

    function draw() {
      var ratio = window.devicePixelRatio || 1, c = canvas.getContext('2d');
      box.width = place.clientWidth; box.height = place.clientHeight;
      if (!box.width) return;
      canvas.width = box.width * ratio; canvas.height = box.height * ratio;
      canvas.style.width = box.width + 'px'; canvas.style.height = box.height + 'px';
      c.scale(ratio, ratio);
      c.font = '11px system-ui, sans-serif'; c.textBaseline = 'middle';
      var step = nice((high - low) / 5), places = Math.max(0, -Math.floor(Math.log10(step)));
      box.left = 14 + Math.max(c.measureText(number(high, places, true)).width, c.measureText(number(low, places, true)).width);
      for (var y = Math.ceil(low / step) * step; y <= high; y += step) {
        c.fillStyle = Math.abs(y) < step / 2 ? color('soft') : color('line'); c.fillRect(box.left, Math.round(Y(y)), box.width - box.left, 1);
        c.fillStyle = color('soft'); c.textAlign = 'right'; c.fillText(number(y, places, true), box.left - 6, Y(y));
      }
      c.textAlign = 'center';
      for (var b = 1; b <= most; b *= 4) { c.fillText(number(b, 0), Math.max(X(b), box.left + 4), box.height - 22); }
      c.textAlign = 'left'; c.fillText('net, quote', box.left + 4, 7);
      c.textAlign = 'right'; c.fillText('bars held', box.width - 4, box.height - 7);
      c.globalAlpha = points.length > 1000 ? 0.5 : 0.8; c.lineWidth = 1.2;
      points.forEach(function (p) {
        c.beginPath(); c.arc(spread(p), Y(p.net), 2.6, 0, 2 * Math.PI);
        if (p.net > 0) { c.fillStyle = color.gain; c.fill(); } else { c.strokeStyle = color.loss; c.stroke(); }
      });
      c.globalAlpha = 1;
    }

    /* Whole numbers of bars would lie in columns: a fixed part of a bar, by the lot's number, sets them apart. */
    function spread(p) { return X(Math.max(1, p.bars + ((p.k * 0.618) % 1 - 0.5) * 0.7)); }
    function nice(x) { var p = Math.pow(10, Math.floor(Math.log10(x))), m = x / p; return (m < 1.5 ? 1 : m < 3.5 ? 2 : m < 7.5 ? 5 : 10) * p; }

    canvas.addEventListener('click', function (event) {
      var at = canvas.getBoundingClientRect(), x = event.clientX - at.left, y = event.clientY - at.top, best = null, least = 200;
      points.forEach(function (p) { var d = Math.pow(spread(p) - x, 2) + Math.pow(Y(p.net) - y, 2); if (d < least) { least = d; best = p; } });
      if (best) { select(best.a, best.k); $('candles').scrollIntoView({ block: 'center' }); }
    });
    paintWith(function () { color.gain = color('gain'); color.loss = color('loss'); draw(); });
    new ResizeObserver(draw).observe(place);
  }

  /* Theme and printing. */

  function setTheme(name) {
    if (name) document.documentElement.dataset.theme = name; else delete document.documentElement.dataset.theme;
    paint();
  }

  function remember(name) { try { localStorage.setItem('perpjax-theme', name); } catch (_) { /* a page may lack a store */ } }

  function recall() { try { return localStorage.getItem('perpjax-theme') || ''; } catch (_) { return ''; } }

  function bindPage() {
    var dark = matchMedia('(prefers-color-scheme: dark)'), stored = recall();
    if (stored === 'light' || stored === 'dark') document.documentElement.dataset.theme = stored;
    $('theme').addEventListener('click', function () {
      var now = document.documentElement.dataset.theme || (dark.matches ? 'dark' : 'light'), next = now === 'dark' ? 'light' : 'dark';
      setTheme(next); remember(next);
    });
    dark.addEventListener('change', paint);
    $('print').addEventListener('click', function () { window.print(); });
    var before = '';
    window.addEventListener('beforeprint', function () { before = document.documentElement.dataset.theme || ''; setTheme('light'); });
    window.addEventListener('afterprint', function () { setTheme(before); });
  }

  async function start() {
    bindPage();
    if (data.compare) {
      drawDaily(data.compare.map(function (run, i) {
        return { name: run.name, lead: true, color: 'run-' + i % 8, style: i < 8 ? 0 : 2, grown: grow(run.daily || {}) };
      }));
    } else {
      drawDaily(ownCurves(data.record));
      var bytes = await inflate($('block').textContent);
      var accounts = data.series.accounts.map(function (packed) {
        var account = unpackAccount(packed, bytes), lots = account.lots;
        lots.costs = Float64Array.from(lots.id, function (_, k) { return lots.slippage[k] + lots.gap_losses[k] + lots.fees[k]; });
        return account;
      });
      shared.accounts = accounts;
      drawAccount(accounts);
      var select = drawLots(accounts);
      drawScatter(accounts, select);
    }
    shared.ready = true;
    document.documentElement.dataset.ready = '1';
  }

  start().catch(fail);
})();
