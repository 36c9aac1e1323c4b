/* A token of each of some rows of logits: what kvserve/worker/together.py does, in machine code.

   A row is cut into chunks, and each chunk folded into a few columns. Where the maxima of k columns
   are at least x, at least k logits are at least x: only those columns are read again. Rows are
   shared out to threads; with one OpenMP library for both these are the ones that llama.cpp
   computes with on a CPU. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>

enum {
    CHUNK = 256,
    LANES = 32, /* wide enough for any vector registers */
    COLUMNS = 4,
    MOST = 1024, /* candidates, as together.py has: with more that equal the k-th, none is drawn */
    FEWEST_ROWS = 3, /* below which waking a thread takes longer than a row */
    NONE = -1,
};

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__)
#define ALSO_FOR_NEWER_PROCESSORS __attribute__((target_clones("avx2", "default")))
#else
#define ALSO_FOR_NEWER_PROCESSORS
#endif

/* Of which source this was made: another one's arguments may be others. */
#ifndef KVSERVE_SOURCE
#define KVSERVE_SOURCE "unknown"
#endif
const char kvserve_source[] = KVSERVE_SOURCE;

struct settings {
    int64_t top_k;
    double top_p, depth, temperature;
};

struct candidates {
    int n;
    int64_t ids[MOST];
    float logits[MOST];
};

/* Of two numbers the first only if it is larger: a NaN as the first never is. */
static inline float larger(float one, float other) { return one > other ? one : other; }

/* Writes the maxima of the columns of `n_chunks`; a column of nothing but NaN has -infinity. */
ALSO_FOR_NEWER_PROCESSORS
static void fold(const float *restrict row, int64_t n_chunks, float *restrict maxima) {
    for (int64_t chunk = 0; chunk < n_chunks; chunk++, row += CHUNK, maxima += COLUMNS) {
        float most[LANES];
        for (int lane = 0; lane < LANES; lane++) most[lane] = larger(row[lane], -INFINITY);
        for (int start = LANES; start < CHUNK; start += LANES)
            for (int lane = 0; lane < LANES; lane++)
                most[lane] = larger(row[start + lane], most[lane]);
        for (int half = LANES / 2; half >= COLUMNS; half /= 2)
            for (int lane = 0; lane < half; lane++)
                most[lane] = larger(most[half + lane], most[lane]);
        for (int column = 0; column < COLUMNS; column++) maxima[column] = most[column];
    }
}

/* Puts `value` in the place of the smallest of a heap, which is at its root. */
static void replace_smallest(float *heap, int64_t n, float value) {
    int64_t place = 0;
    for (;;) {
        int64_t child = 2 * place + 1;
        if (child >= n) break;
        if (child + 1 < n && heap[child + 1] < heap[child]) child++;
        if (heap[child] >= value) break;
        heap[place] = heap[child];
        place = child;
    }
    heap[place] = value;
}

/* Lets a heap keep the largest of what it has and some more. */
static void keep_largest(float *heap, int64_t k, const float *values, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        if (values[i] > heap[0]) replace_smallest(heap, k, values[i]);
}

/* Adds those of a row's logits `first`, `first` + `step`, ... before `end` that are at least
   `least`, in the order of their ids; 0 where there are too many. */
static int add(const float *row, int64_t first, int64_t end, int64_t step, float least,
               struct candidates *found) {
    for (int64_t id = first; id < end; id += step) {
        if (!(row[id] >= least)) continue;
        if (found->n == MOST) return 0;
        int place = found->n++;
        for (; place > 0 && found->ids[place - 1] > id; place--) {
            found->ids[place] = found->ids[place - 1];
            found->logits[place] = found->logits[place - 1];
        }
        found->ids[place] = id;
        found->logits[place] = row[id];
    }
    return 1;
}

/* Adds all of a row that are at least `least`; 0 where there are none, or too many. */
static int add_reaching(const float *row, int64_t n_vocab, const float *maxima, float least,
                        struct candidates *found) {
    int64_t n_chunks = n_vocab / CHUNK;
    found->n = 0;
    for (int64_t column = 0; column < n_chunks * COLUMNS; column++) {
        if (maxima[column] < least) continue;
        int64_t begin = column / COLUMNS * CHUNK;
        if (!add(row, begin + column % COLUMNS, begin + CHUNK, COLUMNS, least, found)) return 0;
    }
    return add(row, n_chunks * CHUNK, n_vocab, 1, least, found) && found->n > 0;
}

/* The k likeliest tokens of a row and some more, in the vocabulary's order; 0 after a failure. */
static int find(const float *row, int64_t n_vocab, int64_t k, float least,
                struct candidates *found) {
    int64_t n_chunks = n_vocab / CHUNK, n_columns = n_chunks * COLUMNS;
    float *maxima = malloc((size_t)(n_columns + k) * sizeof(float));
    if (maxima == NULL) return 0;
    float *heap = maxima + n_columns;
    fold(row, n_chunks, maxima);
    int fits = 0;
    if (2 * k <= n_columns) {
        for (int64_t i = 0; i < k; i++) heap[i] = -INFINITY;
        keep_largest(heap, k, maxima, n_columns);
        /* What follows the last chunk is in no column. */
        keep_largest(heap, k, row + n_chunks * CHUNK, n_vocab - n_chunks * CHUNK);
        fits = add_reaching(row, n_vocab, maxima, larger(heap[0], least), found);
    }
    /* The likeliest may stand side by side, in fewer than k columns. */
    if (!fits) {
        for (int64_t i = 0; i < k; i++) heap[i] = -INFINITY;
        keep_largest(heap, k, row, n_vocab);
        fits = add_reaching(row, n_vocab, maxima, larger(heap[0], least), found);
    }
    free(maxima);
    return fits;
}

static int by_falling(const void *one, const void *other) {
    float a = *(const float *)one, b = *(const float *)other;
    return (a < b) - (a > b);
}

/* How many of the likeliest are left. */
static int count_kept(const float *falling, int n, const struct settings *settings) {
    double highest = falling[0];
    int n_kept = settings->top_k < n ? (int)settings->top_k : n;
    if (settings->top_p < 1) {
        double sums[MOST], total = 0;
        for (int i = 0; i < n_kept; i++) sums[i] = total += exp(falling[i] - highest);
        int n_in = 1;
        while (n_in < n_kept && sums[n_in - 1] < settings->top_p * total) n_in++;
        n_kept = n_in;
    }
    int n_near = 0;
    while (n_near < n_kept && falling[n_near] - highest >= settings->depth) n_near++;
    return n_near;
}

static int64_t draw(const float *row, int64_t n_vocab, const struct settings *settings,
                    double number, float least) {
    struct candidates found;
    if (settings->top_k < 1 || settings->top_k > MOST ||
        !find(row, n_vocab, settings->top_k, least, &found))
        return NONE;
    float falling[MOST];
    for (int i = 0; i < found.n; i++) falling[i] = found.logits[i];
    qsort(falling, (size_t)found.n, sizeof(float), by_falling);
    if (!isfinite(falling[0])) return NONE;
    double highest = falling[0], total = 0, sums[MOST];
    float lowest = falling[count_kept(falling, found.n, settings) - 1];
    for (int i = 0; i < found.n; i++) {
        if (found.logits[i] >= lowest)
            total += exp((found.logits[i] - highest) / settings->temperature);
        sums[i] = total;
    }
    double border = fmin(number * total, nextafter(total, 0));
    int drawn = 0;
    while (sums[drawn] <= border) drawn++;
    return found.ids[drawn];
}

/* Writes a token for each of the rows `logits[index[i]]`, -1 where none could be drawn: without a
   finite logit of at least `least`, or with far more of the likeliest than are asked for. */
void kvserve_draw(const float *logits, int64_t n_vocab, int64_t n_rows, const int64_t *index,
                  const int64_t *top_k, const double *top_p, const double *depth,
                  const double *temperature, const double *numbers, float least, int n_threads,
                  int64_t *tokens) {
    (void)n_threads; /* where there is no OpenMP */
#ifdef _OPENMP
#pragma omp parallel for num_threads(n_threads) schedule(static) if (n_rows >= FEWEST_ROWS)
#endif
    for (int64_t i = 0; i < n_rows; i++) {
        struct settings settings = {top_k[i], top_p[i], depth[i], temperature[i]};
        tokens[i] = draw(logits + index[i] * n_vocab, n_vocab, &settings, numbers[i], least);
    }
}
