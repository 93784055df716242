/* Projections onto exponential and second-order cones with the eigenvectors of their derivatives,
   point by point, and those of semidefinite cones from the eigenvectors of matrices: in torch each
   of them is up to two hundred passes over a batch. The formulas are those of exponential.py,
   curved.py, second_order.py and semidefinite.py. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <stdint.h>
#include <string.h>

#define LARGER(a, b) ((a) > (b) ? (a) : (b))
#define SMALLER(a, b) ((a) < (b) ? (a) : (b))
#define WITHIN(low, v, high) SMALLER(LARGER(v, low), high)

/* What is written of a point: the projection, eigenvectors in the columns, eigenvalues, and a
   distance along the cone's centre in which the derivative does not jump. */
typedef struct {
    double *projection, *vectors, *values, *kink;
} Found;

/* ---- Exponential cones ----------------------------------------------------------------------- */

#define ROUNDING 3.552713678800501e-15
#define LARGEST_START 1e40
#define LONGEST_SEARCH 800.0
#define STEPS_AT_LEAST 2
#define STEPS 5
#define BRACKETED_STEPS 100

typedef struct {
    double sign, level, s0, s1, t0, t1, lower, upper;
} Equation;

static Equation equation_of(const double *unit)
{
    const double x = unit[0], y = unit[1], z = unit[2], difference = y - x;
    const int positive = x > 0 && SMALLER(difference, difference - x - z) < 0;
    Equation of;
    of.sign = positive ? 1.0 : -1.0;
    of.level = of.sign * z;
    of.s0 = positive ? difference : x, of.t0 = positive ? x : difference;
    of.s1 = positive ? x : y, of.t1 = positive ? y : x;
    of.lower = WITHIN(0.0, -of.s0 / of.s1, LARGEST_START);
    of.upper = of.t1 > 0 ? LARGER(of.t0 / of.t1, of.lower) : INFINITY;
    of.upper = SMALLER(of.upper, of.lower + LONGEST_SEARCH);
    return of;
}

static double guess(const Equation *of)
{
    const double level = LARGER(of->level, 0.0), end = -of->s0 / of->s1;
    double r = of->lower;
    for (int last = 0; last < 2; last++) {
        const double gap = 1.0 + r * (r - of->sign), rest = LARGER(of->t0 - of->t1 * r, 0.0);
        const double mass = rest * exp(-r) + level * gap;
        const double rise = log(mass / of->s1) - of->lower;
        double way = rise > 30.0 ? rise : log1p(exp(rise));
        if (last) way -= way * log1p(way) / (2.0 + way);
        r = WITHIN(of->lower, end + way, of->upper);
    }
    return r;
}

/* The value at r, and the step to the root of the A + B exp(C r) with its two derivatives. */
static double step_from(const Equation *of, double r, double *step)
{
    const double e = exp(-r), difference = r - of->sign, gap = 1.0 + r * difference;
    double s = of->s0 + of->s1 * r, t = (of->t0 - of->t1 * r) * e;
    const double value = s - e * (t + of->level * gap);
    s += of->s1, t += of->t1 * e;
    const double slope = s + e * (t - of->level * (r + difference));
    const double bend = s + of->s1 - e * (t + of->t1 * e + 2.0 * of->level);
    const double newton = value / slope, curve = newton * bend / slope;
    const double ratio = SMALLER(curve, 0.99) + 1e-300; /* against 0 / 0 */
    *step = newton * log1p(-ratio) / ratio;
    return value;
}

static int converged(double r, double step) { return fabs(step) <= 3e-6 + 1e-10 * r; }

/* With bisection where a step leaves the bracket of the root. */
static double bracketed(const Equation *of, double r)
{
    double lower = of->lower, upper = of->upper, step;
    for (int taken = 0; taken < BRACKETED_STEPS; taken++) {
        const double value = step_from(of, r, &step), slack = 1e-12 * (1.0 + r), last = r;
        if (value < 0) lower = r;
        if (value > 0) upper = r;
        const int inside = r + step >= lower - slack && r + step <= upper + slack;
        r = inside ? WITHIN(lower, r + step, upper) : lower + (upper - lower) / 2;
        if (converged(r, r - last)) break;
    }
    return r;
}

/* The parameter rho of a point that projects to the curved boundary. */
static double solve(const double *unit)
{
    const Equation of = equation_of(unit);
    double r = guess(&of), step;
    for (int taken = 1; taken <= STEPS; taken++) {
        const double last = r;
        step_from(&of, r, &step);
        r = WITHIN(of.lower, r + step, of.upper);
        if (taken >= STEPS_AT_LEAST && converged(r, r - last)) return of.sign * r;
    }
    return of.sign * bracketed(&of, r);
}

static double dot(const double *a, const double *b)
{
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
}

static void cross(const double *a, const double *b, double *out)
{
    out[0] = a[1] * b[2] - a[2] * b[1];
    out[1] = a[2] * b[0] - a[0] * b[2];
    out[2] = a[0] * b[1] - a[1] * b[0];
}

/* Where points project to the curved boundary. */
static void write_curved(const double *v, const double *unit, double size, Found to)
{
    const double rho = solve(unit), exponent = SMALLER(rho, 0.0);
    const double outer = exp(exponent - rho), inner = exp(exponent);
    const double ray[3] = {rho * outer, outer, inner};
    const double normal[3] = {inner, inner - rho * inner, -outer};
    const double ray_square = dot(ray, ray), normal_square = dot(normal, normal);
    const double along = dot(unit, ray) / ray_square, across = dot(unit, normal) / normal_square;
    const double numerator = LARGER(along, 0.0) * outer * normal_square;
    const double other = LARGER(across, 0.0) * inner * ray_square;
    double axes[3][3], distance[2], lengths[3];
    memcpy(axes[0], ray, sizeof ray);
    cross(normal, ray, axes[1]);
    cross(ray, axes[1], axes[2]);
    for (int k = 0; k < 3; k++) {
        lengths[k] = sqrt(dot(axes[k], axes[k]));
        for (int i = 0; i < 3; i++) to.vectors[3 * i + k] = axes[k][i] / lengths[k];
    }
    to.values[0] = 1.0, to.values[1] = numerator / (numerator + other), to.values[2] = 0.0;
    distance[0] = distance[1] = 0.0;
    for (int i = 0; i < 3; i++) {
        to.projection[i] = LARGER(along, 0.0) * ray[i] * size;
        distance[0] += to.projection[i] * to.projection[i];
        distance[1] += (v[i] - to.projection[i]) * (v[i] - to.projection[i]);
    }
    const double ends = sqrt(SMALLER(distance[0], distance[1]));
    const double middle = 2.0 * sqrt(numerator * other) / lengths[1] * size;
    *to.kink = 0.01 * SMALLER(ends, middle);
}

static void write_exponential(const double *v, int dim, Found to)
{
    const double size = LARGER(LARGER(fabs(v[0]), fabs(v[1])), LARGER(fabs(v[2]), 5e-324));
    const double unit[3] = {v[0] / size, v[1] / size, v[2] / size};
    const double x = unit[0], y = unit[1], z = unit[2];
    const int outside = x > 0 || y > 0;
    int in_cone = y > 0 && y * exp(x / y) <= z + ROUNDING;
    const int in_polar = x > 0 && x * exp(y / x - 1.0) <= ROUNDING - z;
    (void)dim;
    if (outside && !in_cone && !in_polar) {
        write_curved(v, unit, size, to);
        return;
    }
    in_cone |= !(outside || y != 0 || z < 0);
    /* There the projection is (x, 0, max(z, 0)). */
    const int on_face = !(outside || in_cone || (x == 0 && z <= 0));
    to.values[0] = in_cone || on_face, to.values[1] = in_cone;
    to.values[2] = in_cone || (on_face && z > 0);
    for (int i = 0; i < 3; i++) {
        to.projection[i] = to.values[i] * v[i];
        for (int k = 0; k < 3; k++) to.vectors[3 * i + k] = i == k;
    }
    *to.kink = 0.0;
}

/* ---- Second-order cones ---------------------------------------------------------------------- */

/* The reflection that takes the direction e to the first axis or its opposite, beside (1, e) and
   (1, -e) over the root of two. */
static void write_directions(const double *e, int dim, double *vectors)
{
    const double root = sqrt(0.5), first = e[0] + copysign(1.0, e[0]), half = fabs(e[0]) + 1.0;
    vectors[0] = vectors[1] = root;
    for (int k = 2; k < dim; k++) vectors[k] = 0.0;
    for (int i = 1; i < dim; i++) {
        double *row = vectors + (int64_t)i * dim;
        const double factor = (i == 1 ? first : e[i - 1]) / half;
        row[0] = root * e[i - 1], row[1] = -row[0];
        for (int k = 2; k < dim; k++) row[k] = (i == k) - factor * e[k - 1];
    }
}

static void write_second_order(const double *v, int dim, Found to)
{
    const double t = v[0];
    double square = 0.0;
    for (int i = 1; i < dim; i++) square += v[i] * v[i];
    const double norm = sqrt(square), half = (t + norm) / 2;
    const int outside = norm > fabs(t), inside = t >= norm;
    const double share = outside ? t / norm * 0.5 + 0.5 : inside;
    for (int i = 0; i < dim; i++) to.values[i] = share;
    to.values[0] = inside || outside;
    if (dim > 1) to.values[1] = inside;
    *to.kink = fabs(norm - fabs(t));
    if (!outside) {
        for (int i = 0; i < dim; i++) to.projection[i] = inside ? v[i] : 0.0;
        memset(to.vectors, 0, sizeof(double) * dim * dim);
        for (int i = 0; i < dim; i++) to.vectors[(int64_t)i * dim + i] = 1.0;
        return;
    }
    *to.kink = SMALLER(*to.kink, 0.05 * norm);
    to.projection[0] = half;
    for (int i = 1; i < dim; i++) to.projection[i] = v[i] / norm; /* e, for the moment */
    write_directions(to.projection + 1, dim, to.vectors);
    for (int i = 1; i < dim; i++) to.projection[i] *= half;
}

/* ---- Semidefinite cones ---------------------------------------------------------------------- */

/* Eigenvalues and eigenvectors of the derivative for a matrix of order k with eigenvalues l and
   eigenvectors in the columns of q. */
static void write_pairs(const double *l, const double *q, int k, Found to)
{
    const int size = k * (k + 1) / 2;
    const double root = sqrt(2.0);
    int pair = 0;
    for (int j = 0; j < k; j++)
        for (int i = j; i < k; i++, pair++) {
            const double up = LARGER(l[i], 0.0) + LARGER(l[j], 0.0), all = fabs(l[i]) + fabs(l[j]);
            const double share = i == j ? 0.5 : 1.0 / root;
            double *out = to.vectors + pair;
            to.values[pair] = all == 0 ? 0.0 : up / all;
            for (int col = 0; col < k; col++)
                for (int row = col; row < k; row++, out += size) {
                    const double *a = q + row * k, *b = q + col * k;
                    *out = (a[i] * b[j] + a[j] * b[i]) * (row == col ? share : share * root);
                }
        }
}

/* ---- Python ---------------------------------------------------------------------------------- */

enum { POINTS, PROJECTION, VECTORS, VALUES, KINK, BUFFERS };

static PyObject *decompose(PyObject *args, void (*write)(const double *, int, Found), int known)
{
    Py_buffer of[BUFFERS];
    int dim, threads;
    if (!PyArg_ParseTuple(args, "iiy*w*w*w*w*", &dim, &threads, of + POINTS, of + PROJECTION, of + VECTORS,
                          of + VALUES, of + KINK))
        return NULL;
    const int64_t count = of[KINK].len / 8, size = count * dim * 8;
    const int fit = dim >= 1 && (!known || dim == known) && of[POINTS].len == size
        && of[PROJECTION].len == size && of[VALUES].len == size && of[VECTORS].len == size * dim;
    if (fit) {
        Py_BEGIN_ALLOW_THREADS
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads)
#endif
        for (int64_t i = 0; i < count; i++) {
            const Found to = {(double *)of[PROJECTION].buf + i * dim,
                              (double *)of[VECTORS].buf + i * dim * dim,
                              (double *)of[VALUES].buf + i * dim, (double *)of[KINK].buf + i};
            write((const double *)of[POINTS].buf + i * dim, dim, to);
        }
        Py_END_ALLOW_THREADS
        (void)threads;
    } else {
        PyErr_SetString(PyExc_ValueError, "arrays of sizes that do not fit each other");
    }
    for (int i = 0; i < BUFFERS; i++) PyBuffer_Release(of + i);
    if (!fit) return NULL;
    Py_RETURN_NONE;
}

static PyObject *exponential(PyObject *self, PyObject *args)
{
    (void)self;
    return decompose(args, write_exponential, 3);
}

static PyObject *second_order(PyObject *self, PyObject *args)
{
    (void)self;
    return decompose(args, write_second_order, 0);
}

static PyObject *semidefinite(PyObject *self, PyObject *args)
{
    enum { EIGENVALUES, EIGENVECTORS, OUT_VECTORS, OUT_VALUES, ALL };
    Py_buffer of[ALL];
    int order, threads;
    (void)self;
    if (!PyArg_ParseTuple(args, "iiy*y*w*w*", &order, &threads, of + EIGENVALUES, of + EIGENVECTORS,
                          of + OUT_VECTORS, of + OUT_VALUES))
        return NULL;
    const int64_t k = order, size = k * (k + 1) / 2;
    const int64_t count = k > 0 ? of[EIGENVALUES].len / (8 * k) : -1;
    const int fit = of[EIGENVALUES].len == 8 * k * count && of[EIGENVECTORS].len == 8 * k * k * count
        && of[OUT_VECTORS].len == 8 * size * size * count && of[OUT_VALUES].len == 8 * size * count;
    if (fit) {
        Py_BEGIN_ALLOW_THREADS
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads)
#endif
        for (int64_t i = 0; i < count; i++) {
            const Found to = {NULL, (double *)of[OUT_VECTORS].buf + i * size * size,
                              (double *)of[OUT_VALUES].buf + i * size, NULL};
            write_pairs((const double *)of[EIGENVALUES].buf + i * k,
                        (const double *)of[EIGENVECTORS].buf + i * k * k, order, to);
        }
        Py_END_ALLOW_THREADS
        (void)threads;
    } else {
        PyErr_SetString(PyExc_ValueError, "arrays of sizes that do not fit each other");
    }
    for (int i = 0; i < ALL; i++) PyBuffer_Release(of + i);
    if (!fit) return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"exponential", exponential, METH_VARARGS,
     "Decompose points of exponential cones; the arrays after the first are written to."},
    {"second_order", second_order, METH_VARARGS,
     "Decompose points of second-order cones; the arrays after the first are written to."},
    {"semidefinite", semidefinite, METH_VARARGS,
     "Eigenvectors of derivatives, from those of matrices; the last two arrays are written to."},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_projections", NULL, 0, methods,
                                    NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__projections(void) { return PyModule_Create(&module); }
