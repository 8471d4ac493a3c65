/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * How long what one processor has written is on its way to another and back. Two virtual processors may
 * share a core or not, and that may change while they run: rings between two threads take it all the time.
 */
#ifndef CACHE_LINE_H
#define CACHE_LINE_H

/* cffi: begin */

/* Nanoseconds there and back, the median of some; negative: the two do not run, or not at the same time. */
double cache_line_round_trip(int here, int there);

/* cffi: end */

#endif
