/* One primitive of Lightweight Charts that draws the visible lots of an account: boxes, levels, lines and markers. */
'use strict';
var PerpjaxLots = (function () {
  var DETAIL = 220; // with more visible lots only the lines from entry to exit are drawn

  function Lots() {
    this.selected = -1;
    this.from = null;
    this.colors = {};
    var self = this;
    this._views = [
      { zOrder: function () { return 'bottom'; }, renderer: function () { return { draw: function (t) { self._draw(t, true); } }; } },
      { zOrder: function () { return 'top'; }, renderer: function () { return { draw: function (t) { self._draw(t, false); } }; } }
    ];
  }

  Lots.prototype.attached = function (given) { this._chart = given.chart; this._series = given.series; this._request = given.requestUpdate; };
  Lots.prototype.detached = function () { this._chart = this._series = this._request = null; };
  Lots.prototype.paneViews = function () { return this._views; };
  Lots.prototype.updateAllViews = function () {};
  Lots.prototype.redraw = function () { if (this._request) this._request(); };

  /* Take the lots (columns, ordered by entry), and the places of their entries and exits on the chart. */
  Lots.prototype.set = function (lots, from, to) {
    this.lots = lots; this.from = from; this.to = to;
    // The largest exit so far: lots before the first place where it reaches the view are all out of it.
    this.reach = new Float64Array(from.length);
    for (var i = 0, most = -Infinity; i < from.length; i++) this.reach[i] = most = Math.max(most, to[i]);
    this.redraw();
  };

  function lowerBound(values, x) {
    var low = 0, high = values.length;
    while (low < high) { var mid = (low + high) >> 1; if (values[mid] < x) low = mid + 1; else high = mid; }
    return low;
  }
  Lots.lowerBound = lowerBound;

  /* Numbers of the lots between two places. */
  Lots.prototype.visible = function (first, last) {
    var found = [];
    if (!this.from) return found;
    var end = lowerBound(this.from, last + 1e-9);
    for (var i = lowerBound(this.reach, first); i < end; i++) if (this.to[i] >= first) found.push(i);
    return found;
  };

  /* Keep the levels of the chosen lot inside the scale. */
  Lots.prototype.autoscaleInfo = function (first, last) {
    var k = this.selected, lots = this.lots;
    if (k < 0 || !this.from || this.to[k] < first || this.from[k] > last) return null;
    var values = [lots.entry_price[k], lots.exit_price[k], lots.stop[k], lots.target[k]].filter(isFinite);
    var away = Math.abs(lots.liquidation[k] - lots.entry_price[k]), near = Math.abs(lots.stop[k] - lots.entry_price[k]);
    if (isFinite(away) && (away < 3 * near || !isFinite(near))) values.push(lots.liquidation[k]);
    if (!values.length) return null;
    return { priceRange: { minValue: Math.min.apply(null, values), maxValue: Math.max.apply(null, values) } };
  };

  Lots.prototype._draw = function (target, back) {
    if (!this._chart || !this.from || !this.from.length) return;
    var self = this;
    target.useMediaCoordinateSpace(function (scope) { self._paint(scope.context, scope.mediaSize, back); });
  };

  Lots.prototype._paint = function (context, size, back) {
    var scale = this._chart.timeScale(), zero = scale.logicalToCoordinate(0), step = scale.logicalToCoordinate(1) - zero;
    var lots = this.lots, price = lots.entry_price[0];
    var y0 = this._series.priceToCoordinate(price), y1 = this._series.priceToCoordinate(price * 1.01);
    if (!isFinite(zero) || !(step > 0) || y0 === null || y1 === null) return;
    var slope = (y1 - y0) / (price * 0.01);
    var place = {
      x: function (i) { return zero + i * step; },
      y: function (p) { return y0 + (p - price) * slope; },
      step: step, size: size
    };
    var shown = this.visible(-zero / step - 1, (size.width - zero) / step + 1);
    context.save();
    if (shown.length > DETAIL) {
      if (!back) this._paintLines(context, place, shown);
    } else {
      for (var i = 0; i < shown.length; i++) if (shown[i] !== this.selected) this._paintLot(context, place, shown[i], back, false);
    }
    if (this.selected >= 0 && shown.indexOf(this.selected) >= 0) this._paintLot(context, place, this.selected, back, true);
    context.restore();
  };

  Lots.prototype._exit = function (k) { var p = this.lots.exit_price[k]; return isFinite(p) ? p : this.lots.last; };

  /* Many lots: two paths, one of gains and one of losses. */
  Lots.prototype._paintLines = function (context, place, shown) {
    for (var won = 0; won < 2; won++) {
      context.beginPath();
      for (var i = 0; i < shown.length; i++) {
        var k = shown[i];
        if ((this.lots.net[k] > 0) !== !!won) continue;
        var x = place.x(this.from[k]);
        context.moveTo(x, place.y(this.lots.entry_price[k]));
        context.lineTo(Math.max(place.x(this.to[k]), x + 1), place.y(this._exit(k)));
      }
      context.strokeStyle = won ? this.colors.gain : this.colors.loss;
      context.lineWidth = 1;
      context.globalAlpha = 0.7;
      context.stroke();
      context.globalAlpha = 1;
    }
  };

  Lots.prototype._paintLot = function (context, place, k, back, chosen) {
    var lots = this.lots, colors = this.colors, won = lots.net[k] > 0, open = lots.reason[k] === 'open';
    var left = place.x(this.from[k]) - place.step / 2, right = place.x(this.to[k]) + place.step / 2;
    var entry = place.y(lots.entry_price[k]), exit = place.y(this._exit(k)), width = Math.max(right - left, 1);
    if (back) {
      [['target', colors.gain], ['stop', colors.loss]].forEach(function (level) {
        if (!isFinite(lots[level[0]][k])) return;
        var y = place.y(lots[level[0]][k]);
        context.globalAlpha = chosen ? 0.16 : 0.06;
        context.fillStyle = level[1];
        context.fillRect(left, Math.min(entry, y), width, Math.abs(y - entry));
        context.globalAlpha = chosen ? 0.9 : 0.35;
        context.fillRect(left, Math.round(y), width, 1);
      });
      if (isFinite(lots.liquidation[k])) {
        context.globalAlpha = chosen ? 1 : 0.4;
        dash(context, [1, 3], colors.ink, 1, left, place.y(lots.liquidation[k]), right, place.y(lots.liquidation_at_exit[k]));
        if (chosen) label(context, 'liquidation', left + 3, place.y(lots.liquidation[k]) - 4, colors.soft);
      }
      if (chosen && isFinite(lots.stop[k])) label(context, 'stop', left + 3, place.y(lots.stop[k]) - 4, colors.loss);
      if (chosen && isFinite(lots.target[k])) label(context, 'target', left + 3, place.y(lots.target[k]) - 4, colors.gain);
      context.globalAlpha = 1;
      return;
    }
    var x0 = place.x(this.from[k]), x1 = place.x(this.to[k]), color = won ? colors.gain : colors.loss;
    dash(context, won ? [] : [4, 3], color, chosen ? 2.5 : 1.5, x0, entry, x1, exit);
    var long = lots.side[k] === 'long', r = chosen ? 6 : place.step < 2 ? 3 : 4.5;
    context.fillStyle = colors.accent;
    polygon(context, long ? [[x0 - r, entry + r * 1.6], [x0 + r, entry + r * 1.6], [x0, entry]]
      : [[x0 - r, entry - r * 1.6], [x0 + r, entry - r * 1.6], [x0, entry]]);
    if (!open) mark(context, lots.reason[k], x1, exit, r * 0.85, color, colors.card);
    if (chosen) {
      var gap = exit < entry ? -11 : 18;
      label(context, lots.reasonText(k), Math.min(x1 + 6, place.size.width - 120), exit + gap, color);
    }
  };

  function dash(context, pattern, color, width, x0, y0, x1, y1) {
    context.beginPath(); context.setLineDash(pattern); context.strokeStyle = color; context.lineWidth = width;
    context.moveTo(x0, y0); context.lineTo(x1, y1); context.stroke(); context.setLineDash([]);
  }

  function label(context, text, x, y, color) {
    context.font = '11px system-ui, sans-serif'; context.fillStyle = color; context.fillText(text, x, y);
  }

  function polygon(context, points) {
    context.beginPath();
    points.forEach(function (p, i) { if (i) context.lineTo(p[0], p[1]); else context.moveTo(p[0], p[1]); });
    context.closePath(); context.fill();
  }

  /* The shape tells the reason of the exit; the colour tells gain and loss. */
  function mark(context, reason, x, y, r, color, paper) {
    context.fillStyle = color; context.strokeStyle = color; context.lineWidth = 2;
    if (reason === 'target') polygon(context, [[x, y - r * 1.2], [x + r * 1.2, y], [x, y + r * 1.2], [x - r * 1.2, y]]);
    else if (reason === 'liquidated') context.fillRect(x - r, y - r, 2 * r, 2 * r);
    else if (reason === 'stopped') {
      context.beginPath();
      context.moveTo(x - r, y - r); context.lineTo(x + r, y + r); context.moveTo(x + r, y - r); context.lineTo(x - r, y + r);
      context.stroke();
    } else {
      context.beginPath(); context.arc(x, y, r, 0, 2 * Math.PI);
      if (reason === 'timed_out') { context.fillStyle = paper; context.fill(); context.stroke(); } else context.fill();
    }
  }

  /* The lot nearest to a point of the chart, or -1. */
  Lots.prototype.nearest = function (x, y) {
    var scale = this._chart.timeScale(), zero = scale.logicalToCoordinate(0), step = scale.logicalToCoordinate(1) - zero;
    var best = -1, least = 30 * 30, found = this.visible((x - 30 - zero) / step, (x + 30 - zero) / step);
    for (var i = 0; i < found.length; i++) {
      var k = found[i], x0 = zero + this.from[k] * step, x1 = zero + this.to[k] * step;
      var y0 = this._series.priceToCoordinate(this.lots.entry_price[k]), y1 = this._series.priceToCoordinate(this._exit(k));
      var dx = x1 - x0, dy = y1 - y0, along = Math.max(0, Math.min(1, ((x - x0) * dx + (y - y0) * dy) / (dx * dx + dy * dy || 1)));
      var away = Math.pow(x - x0 - along * dx, 2) + Math.pow(y - y0 - along * dy, 2);
      if (away < least) { least = away; best = k; }
    }
    return best;
  };

  return Lots;
})();
