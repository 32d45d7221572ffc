package isolate

// counted is a function that a crossing leads to, and how often since the module's account was told.
type counted struct {
	name  string
	plain bool // a call of it writes nothing for the module, and neither gives nor takes memory
	once  bool // it is judged anew at each call, and counted then
	times uint64
}

// recent are functions by address. A crossing looks for the same few again and again, in a place of theirs: a map's hash costs
// more than all that a crossing judges.
type recent struct {
	all    map[uint64]*counted
	places [1 << 6]struct {
		at uint64
		is *counted
	}
}

func (r *recent) place(at uint64) int { return int(at>>4) % len(r.places) }

// get is the function at an address, if it is there.
func (r *recent) get(at uint64) *counted {
	p := &r.places[r.place(at)]
	if p.is != nil && p.at == at {
		return p.is
	}
	c := r.all[at]
	if c != nil {
		p.at, p.is = at, c
	}
	return c
}

// put takes a function in.
func (r *recent) put(at uint64, c *counted) {
	if r.all == nil {
		r.all = map[uint64]*counted{}
	}
	r.all[at] = c
}

// told adds how often each was to counts, and counts anew.
func (r *recent) told(counts map[string]uint64) {
	for _, c := range r.all {
		if c.times > 0 {
			count(counts, c.name, c.times)
			c.times = 0
		}
	}
}
