/* A whole layer: from parameters to outputs, and from gradients of outputs to those of parameters.

   Parameters p give the data of a program in (t, x) by a sparse affine map. The first `count` rows
   and variables are those of a substitution: c t + A_E x = d, with the objective 1/2 t'C t + r't
   besides q'x + 1/2 x'P_X x. With w = C / c^2 and v = -r / c, u = d - A_E x, that leaves

       minimise 1/2 x'(P_X + A_E'w A_E) x + (q + A_E'(v - w d))'x  subject to  A x + s = b,

   and t = u / c, y_E = v - w u. Every answer is verified by the parts, not by what is formed of
   them. Only elements are answered whose solution and derivative are beyond doubt; all others are
   left to those who look closer. */
#pragma once

#include "method.h"
#include "system.h"

/* Violation of an optimality condition, relative to its terms, up to which it is rounding; and what
   the adjoint system may leave, relative to its terms. */
#define ROUNDING 1e-13
#define ADJOINT_ROUNDING 1e-12
/* Slacks and multipliers that are smaller, relative to the terms of their condition, may be zero. */
#define MARGIN 1e-8
/* Variables and multipliers are known to a share of the largest one, and those of the substitution
   to a share of the terms that they are made of. */
#define KNOWN 1e-4
/* Right-hand sides from here on mean that there is no bound. */
#define NO_BOUND 1e15

/* Entries of the data that follow each other in a row of P or A, or in q or b, from row number
   `first` of the map on. Where each of them is one entry of the parameters times the same factor,
   these are `source`, source + step, ... . */
typedef struct {
    int64_t row, col, length, first, source, step;
} Line;

/* What else `source` may be: all entries are constant, or they are sums. */
enum { CONSTANTS = -1, SUMS = -2 };

/* Parts of the data. */
enum { IN_P, IN_Q, IN_A, IN_B };

typedef struct {
    int n, m, count, equalities, batch, shared, inputs, outputs;
    int64_t size; /* entries of all parameters of an element */
    /* The map from parameters to data, by rows, and its lines in P, q, A and b. */
    const int64_t *start, *source;
    const double *factor, *constant;
    const Line *lines;
    const int64_t *sections;
    /* Sizes of parameters and outputs; entries of outputs: their place in (x, y) or -1, factors. */
    const int64_t *widths, *heights, *place;
    const double *share;
    double **input, **output, **gradient; /* gradient: of the inputs, NULL if not wanted */
    const int64_t *stride;                /* of inputs: their width, or 0 if they are shared */
    double *x, *y;                        /* the solutions, batch x n and batch x m */
    double tolerance;
    int64_t limit;
    char *failed;
} Layer;

/* Memory of a thread, besides `Work`. */
typedef struct {
    double *p, *gradient;                    /* size */
    double *A_E, *weighted;                  /* count x ln; weighted: w A_E */
    double *P_X;                             /* n x ln */
    double *C, *c, *w, *d, *v, *u, *y_E;     /* count */
    double *q_X, *q, *size_x;                /* ln */
    double *b, *s, *size_b;                  /* lm */
    double *dq, *db, *xs, *ys;               /* of the whole program */
} Parts;

/* Puts the parts into memory, if there is any; returns how much they need. */
static int64_t carve(Parts *parts, const Layer *t, double *memory)
{
    const int64_t ln = rounded(t->n), lm = rounded(t->m), count = rounded(t->count);
    const int64_t x = rounded(t->count + t->n), y = rounded(t->count + t->m);
    const int64_t size = rounded(t->size), sizes[] = {
        size, size, t->count * ln, t->count * ln, t->n * ln, count, count, count, count,
        count, count, count, ln, ln, ln, lm, lm, lm, x, y, x, y};
    Parts unused, *all = parts ? parts : &unused;
    double **at[] = {
        &all->p, &all->gradient, &all->A_E, &all->weighted, &all->P_X, &all->C,
        &all->c, &all->w, &all->d, &all->v, &all->u, &all->y_E,
        &all->q_X, &all->q, &all->size_x, &all->b, &all->s, &all->size_b,
        &all->dq, &all->db, &all->xs, &all->ys};
    int64_t total = 0;
    for (size_t i = 0; i < sizeof(sizes) / sizeof(*sizes); total += sizes[i++])
        *at[i] = memory ? memory + total : NULL;
    return total;
}

/* ---- Parameters to data, and back ------------------------------------------------------------ */

/* Parameters of an element; shared ones once. Whether all are finite. */
INLINE int gather(const Layer *t, Parts *parts, int element, int ready)
{
    double *p = parts->p, zero = 0.0;
    for (int i = 0; i < t->inputs; p += t->widths[i++]) {
        if (!t->stride[i] && ready) continue;
        const double *from = t->input[i] + element * t->stride[i];
        Lanes sum = {0.0};
        int64_t k = 0;
        memcpy(p, from, t->widths[i] * sizeof(double));
        for (; k + LANES <= t->widths[i]; k += LANES) sum += 0.0 * ANYWHERE(from, k);
        for (; k < t->widths[i]; k++) zero += 0.0 * from[k];
        for (int lane = 0; lane < LANES; lane++) zero += sum[lane];
    }
    return zero == 0.0;
}

INLINE double value(const Layer *t, const double *p, int64_t row)
{
    double sum = t->constant[row];
    for (int64_t k = t->start[row]; k < t->start[row + 1]; k++)
        sum += t->factor[k] * p[t->source[k]];
    return sum;
}

/* The entries of a line, to out[0], out[stride], ... */
INLINE void read_line(const Layer *t, const double *p, const Line *line, double *restrict out,
                      int64_t stride)
{
    const int64_t length = line->length, first = line->first, step = line->step;
    if (line->source >= 0) {
        const double factor = t->factor[t->start[first]], *from = p + line->source;
        if (stride == 1 && step == 1)
            for (int64_t i = 0; i < length; i++) out[i] = factor * from[i];
        else
            for (int64_t i = 0; i < length; i++) out[i * stride] = factor * from[i * step];
    } else if (line->source == CONSTANTS) {
        for (int64_t i = 0; i < length; i++) out[i * stride] = t->constant[first + i];
    } else {
        for (int64_t i = 0; i < length; i++) out[i * stride] = value(t, p, first + i);
    }
}

/* Gradients a u - b v of the entries of a line, to those of the parameters. */
INLINE void spread_line(const Layer *t, double *restrict gradient, const Line *line, double a,
                        const double *restrict u, double b, const double *restrict v)
{
    const int64_t length = line->length, step = line->step;
    if (line->source == CONSTANTS || (a == 0.0 && b == 0.0)) return;
    if (line->source >= 0) {
        const double factor = t->factor[t->start[line->first]];
        double *out = gradient + line->source;
        a *= factor, b *= factor;
        if (step == 1)
            for (int64_t i = 0; i < length; i++) out[i] += a * u[i] - b * v[i];
        else
            for (int64_t i = 0; i < length; i++) out[i * step] += a * u[i] - b * v[i];
        return;
    }
    for (int64_t i = 0; i < length; i++) {
        const int64_t row = line->first + i;
        for (int64_t k = t->start[row]; k < t->start[row + 1]; k++)
            gradient[t->source[k]] += t->factor[k] * (a * u[i] - b * v[i]);
    }
}

/* Lines of a part of the data. */
#define FOR_LINES(t, part, line)                                                                   \
    for (const Line *line = (t)->lines + (t)->sections[part],                                         \
                    *end_##line = (t)->lines + (t)->sections[(part) + 1];                             \
         line < end_##line; line++)

/* C and P_X. */
STEP void take_P(Work *w, const Layer *t, Parts *parts)
{
    const int count = t->count;
    memset(parts->C, 0, rounded(count) * sizeof(double));
    memset(parts->P_X, 0, (int64_t)t->n * w->ln * sizeof(double));
    FOR_LINES(t, IN_P, line) {
        const int64_t i = line->row, j = line->col;
        double *out = i < count ? parts->C + i : parts->P_X + (i - count) * w->ln + j - count;
        read_line(t, parts->p, line, out, 1);
    }
}

/* c, A_E and A, of which rows get the columns of At that `slot` says, or none (-1). */
STEP void take_A(Work *w, const Layer *t, Parts *parts, const int *slot)
{
    const int count = t->count;
    memset(parts->A_E, 0, (int64_t)count * w->ln * sizeof(double));
    memset(w->At, 0, (int64_t)w->n * w->lm * sizeof(double));
    FOR_LINES(t, IN_A, line) {
        const int64_t i = line->row, j = line->col - count;
        if (j < 0) read_line(t, parts->p, line, parts->c + i, 1);
        else if (i < count) read_line(t, parts->p, line, parts->A_E + i * w->ln + j, 1);
        else if (slot[i - count] >= 0)
            read_line(t, parts->p, line, w->At + j * w->lm + slot[i - count], w->lm);
    }
}

/* w, and P = P_X + A_E'w A_E. */
STEP void form_P(Work *w, const Layer *t, Parts *parts)
{
    const int n = t->n, ln = w->ln;
    for (int e = 0; e < t->count; e++) {
        const double factor = parts->C[e] / (parts->c[e] * parts->c[e]);
        const double *row = parts->A_E + (int64_t)e * ln;
        double *out = parts->weighted + (int64_t)e * ln;
        parts->w[e] = factor;
        for (int j = 0; j < ln; j++) out[j] = factor * row[j];
    }
    for (int i = 0; i < n; i++) {
        double *row = w->P + (int64_t)i * ln;
        const int from = i & ~(LANES - 1);
        memcpy(row, parts->P_X + (int64_t)i * ln, ln * sizeof(double));
        combine(1.0, row, parts->A_E, ln, parts->weighted + i, ln, t->count, from, ln);
        for (int j = 0; j < i; j++) row[j] = w->P[(int64_t)j * ln + i];
    }
}

/* The vectors: r, q_X, d, b, v, and q = q_X + A_E'(v - w d). */
STEP void take_data_vectors(Work *w, const Layer *t, Parts *parts)
{
    const int count = t->count;
    FOR_LINES(t, IN_Q, line) read_line(t, parts->p, line, parts->dq + line->col, 1);
    FOR_LINES(t, IN_B, line) read_line(t, parts->p, line, parts->db + line->col, 1);
    memcpy(parts->q_X, parts->dq + count, t->n * sizeof(double));
    memcpy(parts->b, parts->db + count, t->m * sizeof(double));
    for (int e = 0; e < count; e++) {
        parts->d[e] = parts->db[e];
        parts->v[e] = -parts->dq[e] / parts->c[e];
        parts->u[e] = parts->v[e] - parts->w[e] * parts->d[e];
    }
    memcpy(parts->q, parts->q_X, w->ln * sizeof(double));
    combine(1.0, parts->q, parts->A_E, w->ln, parts->u, 1, count, 0, w->ln);
}

/* u and y_E at x. */
INLINE void find_substituted(const Work *w, const Layer *t, Parts *parts, const double *x)
{
    for (int e = 0; e < t->count; e++) {
        parts->u[e] = parts->d[e] - dot(parts->A_E + (int64_t)e * w->ln, x, 0, t->n);
        parts->y_E[e] = parts->v[e] - parts->w[e] * parts->u[e];
    }
}

/* ---- Forward --------------------------------------------------------------------------------- */

/* out += |row| |factor|, entry by entry. */
INLINE void add_sizes(double *restrict out, const double *restrict row, double factor, int length)
{
    for (int j = 0; j < length; j++) out[j] += fabs(row[j] * factor);
}

/* Sizes of the terms of the dual condition, after `find_substituted`. */
INLINE void find_dual_sizes(const Work *w, const Layer *t, Parts *parts, const double *x,
                            const double *y)
{
    double *size = parts->size_x;
    const int ln = w->ln;
    const double largest = largest_entry(y, t->m), least_x = KNOWN * largest_entry(x, t->n);
    const double least_y = KNOWN * LARGER(largest, largest_entry(parts->y_E, t->count));
    for (int j = 0; j < t->n; j++) {
        const double *column = w->At + (int64_t)j * w->lm;
        size[j] = fabs(parts->q_X[j]);
        for (int i = 0; i < t->m; i++) size[j] += fabs(column[i]) * (fabs(y[i]) + least_y);
    }
    for (int j = 0; j < t->n; j++)
        add_sizes(size, parts->P_X + (int64_t)j * ln, fabs(x[j]) + least_x, t->n);
    for (int e = 0; e < t->count; e++) {
        const double *row = parts->A_E + (int64_t)e * ln;
        double terms = fabs(parts->d[e]);
        for (int j = 0; j < t->n; j++) terms += fabs(row[j] * x[j]);
        terms = fabs(parts->v[e]) + fabs(parts->w[e]) * terms;
        add_sizes(size, row, fabs(parts->y_E[e]) + least_y + KNOWN * terms, t->n);
    }
}

/* Sizes of the terms of A x + s = b; where x and b are zero, shares of what A x would be at the
   minimum without constraints. */
INLINE void find_primal_sizes(const Work *w, const Layer *t, Parts *parts, const double *x)
{
    const double least = KNOWN * largest_entry(x, t->n), away = KNOWN * largest_entry(w->v, t->n);
    for (int i = 0; i < t->m; i++) {
        const double natural = w->unit[i] > 0.0 ? away / w->unit[i] : 0.0;
        parts->size_b[i] = LARGER(fabs(parts->b[i]), natural);
    }
    for (int j = 0; j < t->n; j++)
        add_sizes(parts->size_b, w->At + (int64_t)j * w->lm, fabs(x[j]) + least, t->m);
}

/* Whether the optimality conditions hold to rounding. */
INLINE int is_solution(Work *w, const Layer *t, Parts *parts, const double *x, const double *y)
{
    double *dual = w->g;
    memcpy(dual, parts->q_X, w->ln * sizeof(double));
    combine(1.0, dual, parts->A_E, w->ln, parts->y_E, 1, t->count, 0, w->ln);
    for (int j = 0; j < t->n; j++) {
        const double sum = dual[j] + dot(parts->P_X + (int64_t)j * w->ln, x, 0, t->n)
                           + dot(w->At + (int64_t)j * w->lm, y, 0, t->m);
        if (!(fabs(sum) <= ROUNDING * parts->size_x[j])) return 0;
    }
    for (int i = 0; i < w->lm; i++) w->rp[i] = 0.0;
    combine(1.0, w->rp, w->At, w->lm, x, 1, t->n, 0, w->lm);
    for (int i = 0; i < t->m; i++) {
        const double left = fabs(w->rp[i] + parts->s[i] - parts->b[i]);
        if (!(left <= ROUNDING * parts->size_b[i] && parts->b[i] < NO_BOUND)) return 0;
    }
    return 1;
}

/* Whether every inequality clearly has a slack or a multiplier, and all equalities count. */
INLINE int is_strict(const Work *w, const Layer *t, const Parts *parts, const double *y)
{
    const double unit = MARGIN * largest_entry(parts->size_x, t->n);
    for (int i = 0; i < t->m; i++) {
        const int is_active = w->place[i] >= 0;
        if (i < t->equalities) {
            if (!is_active) return 0;
        } else if (is_active) {
            double largest = 0.0;
            for (int j = 0; j < t->n; j++)
                largest = LARGER(largest, fabs(w->At[(int64_t)j * w->lm + i]));
            if (!(y[i] * largest > unit)) return 0;
        } else if (!(parts->s[i] > MARGIN * parts->size_b[i])) {
            return 0;
        }
    }
    return 1;
}

INLINE void give_outputs(const Layer *t, int element, const double *x, const double *y)
{
    int64_t k = 0;
    for (int output = 0; output < t->outputs; output++) {
        double *out = t->output[output] + element * t->heights[output];
        for (int64_t i = 0; i < t->heights[output]; i++, k++) {
            const int64_t at = t->place[k];
            out[i] = at < 0 ? 0.0 : t->share[k] * (at < t->n ? x[at] : y[at - t->n]);
        }
    }
}

/* Every row of A has its own column of At. */
INLINE void take_all_rows(const Work *w)
{
    for (int i = 0; i < w->m; i++) w->spare[i] = i;
}

/* Whether an element is solved, beyond doubt. */
INLINE int solve_layer(Work *w, const Layer *t, int element, int *ready)
{
    Parts parts;
    carve(&parts, t, w->extra);
    double *x = t->x + (int64_t)element * t->n, *y = t->y + (int64_t)element * t->m;
    const Batch one = {.n = t->n, .m = t->m, .equalities = t->equalities, .batch = 1,
                       .q = parts.q, .b = parts.b, .x = x, .y = y, .s = parts.s,
                       .tolerance = t->tolerance, .limit = t->limit};
    int64_t steps = 0;
    if (!gather(t, &parts, element, *ready)) return 0;
    if (!t->shared || !*ready) {
        take_all_rows(w);
        take_P(w, t, &parts);
        take_A(w, t, &parts, w->spare);
        form_P(w, t, &parts);
        *ready = 1 + factorise_any(w);
        if (*ready == 2) project_rows(w);
    }
    if (*ready != 2) return 0;
    take_data_vectors(w, t, &parts);
    if (solve_element(w, &one, 0, &steps) != SOLVED) return 0;
    find_substituted(w, t, &parts, x);
    find_dual_sizes(w, t, &parts, x, y);
    find_primal_sizes(w, t, &parts, x);
    if (!is_solution(w, t, &parts, x, y) || !is_strict(w, t, &parts, y)) return 0;
    give_outputs(t, element, x, y);
    return 1;
}

/* ---- Backward -------------------------------------------------------------------------------- */

/* Gradients of x and y from those of the outputs. */
INLINE void take_gradients(const Layer *t, int element, double *x, double *y)
{
    int64_t k = 0;
    memset(x, 0, t->n * sizeof(double));
    memset(y, 0, t->m * sizeof(double));
    for (int output = 0; output < t->outputs; k += t->heights[output++]) {
        if (!t->output[output]) continue;
        const double *given = t->output[output] + element * t->heights[output];
        for (int64_t i = 0; i < t->heights[output]; i++) {
            const int64_t at = t->place[k + i];
            if (at < 0) continue;
            *(at < t->n ? x + at : y + at - t->n) += t->share[k + i] * given[i];
        }
    }
}

/* The columns of At for active rows; w->m becomes their number. Whether there are not too many. */
INLINE int take_active_rows(Work *w, const Layer *t, const double *y, int *slot)
{
    w->m = 0;
    for (int i = 0; i < t->m; i++) slot[i] = i < t->equalities || y[i] > 0.0 ? w->m++ : -1;
    return w->m <= t->n;
}

/* Whether w->x and w->y solve P x + A_W'y + v = 0, A_W x = d to rounding; P by its parts. */
INLINE int is_adjoint(Work *w, const Layer *t, Parts *parts)
{
    const int n = t->n, ln = w->ln;
    double *left = w->g, *size = parts->size_x, largest = 0.0;
    for (int e = 0; e < t->count; e++)
        parts->u[e] = dot(parts->weighted + (int64_t)e * ln, w->x, 0, n);
    for (int j = 0; j < ln; j++) left[j] = size[j] = 0.0;
    combine(1.0, left, parts->A_E, ln, parts->u, 1, t->count, 0, ln);
    for (int e = 0; e < t->count; e++)
        add_sizes(size, parts->A_E + (int64_t)e * ln, parts->u[e], n);
    for (int j = 0; j < n; j++) {
        const double *row = parts->P_X + (int64_t)j * ln, *column = w->At + (int64_t)j * w->lm;
        left[j] += w->v[j] + dot(row, w->x, 0, n) + dot(column, w->y, 0, w->m);
        size[j] += fabs(w->v[j]) + largest_term(row, w->x, n) + largest_term(column, w->y, w->m);
        largest = LARGER(largest, size[j]);
    }
    for (int j = 0; j < n; j++)
        if (!(fabs(left[j]) <= ADJOINT_ROUNDING * largest)) return 0;
    find_activity(w);
    const double least = KNOWN * largest_entry(w->x, n);
    for (int i = 0; i < w->m; i++) {
        double terms = fabs(w->d[i]);
        for (int j = 0; j < n; j++)
            terms += fabs(w->At[(int64_t)j * w->lm + i]) * (fabs(w->x[j]) + least);
        if (!(fabs(w->rp[i] - w->d[i]) <= ADJOINT_ROUNDING * terms)) return 0;
    }
    return 1;
}

/* Solve the adjoint system for gradients of x and y, in dq and db; gives those of q_X and b there.
   Whether that is beyond doubt. */
INLINE int solve_adjoint(Work *w, const Layer *t, Parts *parts, const int *slot)
{
    double *dq = parts->dq + t->count, *db = parts->db + t->count;
    clear(w);
    for (int i = 0; i < w->m; i++)
        if (!add(w, i)) return 0;
    if (!is_regular(w)) return 0;
    for (int j = 0; j < t->n; j++) {
        if (w->is_proximal && is_free(w, j)) return 0;
        w->v[j] = -dq[j];
    }
    for (int i = 0; i < w->lm; i++) w->d[i] = 0.0;
    for (int i = 0; i < t->m; i++)
        if (slot[i] >= 0) w->d[slot[i]] = db[i];
    if (!solve_conditions(w) || !is_adjoint(w, t, parts)) return 0;
    const double unit = LARGER(largest_entry(w->v, t->n), largest_entry(w->d, w->m));
    if (!(largest_entry(w->x, t->n) <= INFLATED * unit)) return 0;
    for (int j = 0; j < t->n; j++) dq[j] = 0.0 - w->x[j];
    for (int i = 0; i < t->m; i++) db[i] = slot[i] < 0 ? 0.0 : w->y[slot[i]];
    return 1;
}

/* Gradients of r and d from those of q_X, and the whole solution. */
INLINE void extend_gradients(const Work *w, const Layer *t, Parts *parts, const double *x,
                             const double *y)
{
    const int count = t->count;
    for (int e = 0; e < count; e++) {
        const double moved = 0.0 - dot(parts->A_E + (int64_t)e * w->ln, parts->dq + count, 0, t->n);
        parts->dq[e] = moved / parts->c[e];
        parts->db[e] = parts->w[e] * moved;
        parts->xs[e] = parts->u[e] / parts->c[e];
        parts->ys[e] = parts->y_E[e];
    }
    memcpy(parts->xs + count, x, t->n * sizeof(double));
    memcpy(parts->ys + count, y, t->m * sizeof(double));
}

/* Gradients of the data to those of the parameters. */
INLINE void spread_gradients(const Layer *t, Parts *parts)
{
    const double *dq = parts->dq, *db = parts->db, *x = parts->xs, *y = parts->ys;
    double *out = parts->gradient;
    memset(out, 0, t->size * sizeof(double));
    FOR_LINES(t, IN_P, line)
        spread_line(t, out, line, dq[line->row], x + line->col, 0.0, x);
    FOR_LINES(t, IN_Q, line) spread_line(t, out, line, 1.0, dq + line->col, 0.0, dq);
    FOR_LINES(t, IN_A, line)
        spread_line(t, out, line, y[line->row], dq + line->col, db[line->row], x + line->col);
    FOR_LINES(t, IN_B, line) spread_line(t, out, line, 1.0, db + line->col, 0.0, db);
}

/* Whether the gradients of an element are beyond doubt. */
INLINE int differentiate_layer(Work *w, const Layer *t, int element, int *ready)
{
    Parts parts;
    carve(&parts, t, w->extra);
    const double *x = t->x + (int64_t)element * t->n, *y = t->y + (int64_t)element * t->m;
    int *slot = w->spare;
    if (!gather(t, &parts, element, *ready) || !take_active_rows(w, t, y, slot)) return 0;
    if (!t->shared || !*ready) take_P(w, t, &parts);
    take_A(w, t, &parts, slot);
    if (!t->shared || !*ready) {
        form_P(w, t, &parts);
        *ready = 1 + factorise_any(w);
    }
    if (*ready != 2) return 0;
    project_rows(w);
    take_data_vectors(w, t, &parts);
    take_gradients(t, element, parts.dq + t->count, parts.db + t->count);
    if (!solve_adjoint(w, t, &parts, slot)) return 0;
    find_substituted(w, t, &parts, x);
    extend_gradients(w, t, &parts, x, y);
    spread_gradients(t, &parts);
    const double *from = parts.gradient;
    for (int i = 0; i < t->inputs; from += t->widths[i++])
        if (t->gradient[i])
            memcpy(t->gradient[i] + element * t->widths[i], from, t->widths[i] * sizeof(double));
    return 1;
}
