"""Names of examinations: hundreds that people order, what is refused, and the rules that keep narrow before broad."""

from __future__ import annotations

import json

import pytest
from clinic_cases import shared_data

from m3.environment.exams import CATEGORIES, categories, categorise

ORDERED = {
    "full_blood_count": (
        "CBC; FBC; cbc with diff; Complete blood count (CBC) with differential; full blood count; hemoglobin; "
        "Haemoglobin and haematocrit; H&H; platelet count; WBC; white cell count; leukocyte count; haematology; "
        "neutrophil count"
    ),
    "electrolytes_and_renal_function": (
        "U&E; U&Es; UEs; urea and electrolytes; BMP; basic metabolic panel; CMP; RFT; KFT; Chem-7; "
        "serum electrolytes; Na; K+; HCO3-; calcium; serum Mg; phosphate; renal function tests; BUN/Cr; "
        "creatinine; eGFR; uric acid; serum osmolality; blood chemistry; biochemistry panel; kidney profile; "
        "Urea_Nitrogen"
    ),
    "liver_function": (
        "LFT; LFTs; liver function tests; liver panel; hepatic panel; ALT; AST/ALT; bilirubin; albumin; ALP; "
        "alkaline phosphatase; GGT; transaminases; serum lipase; amylase; ammonia level"
    ),
    "glucose_and_lipids": (
        "glucose; HbA1c; hemoglobin A1c; fasting blood sugar; random glucose; OGTT; lipid profile; "
        "fasting lipids; cholesterol; LDL; triglycerides; capillary glucose; fingerstick glucose; BM; "
        "serum ketones"
    ),
    "cardiac_markers": (
        "trop; troponin; troponin I; hs-TnT; high-sensitivity troponin; cardiac enzymes; CK-MB; BNP; NT-proBNP; "
        "creatine kinase; CK; CPK; serial troponins"
    ),
    "coagulation": (
        "coags; coagulation profile; PT/INR; INR; aPTT; clotting screen; D-dimer; fibrinogen; factor V Leiden; "
        "von Willebrand factor; bleeding time; Protein C and S; thrombophilia screen; mixing study"
    ),
    "inflammatory_markers": (
        "CRP; ESR; C-reactive protein; erythrocyte sedimentation rate; procalcitonin; sed rate; inflammatory markers"
    ),
    "blood_gas": (
        "ABG; VBG; arterial blood gas; venous blood gases; lactate; serum lactic acid; PaCO2; methaemoglobin"
    ),
    "iron_and_vitamins": (
        "ferritin; iron studies; TIBC; B12; vitamin B12 and folate; folate; vitamin D; 25-OH vitamin D; "
        "transferrin saturation; homocysteine; zinc"
    ),
    "thyroid_function": ("TSH; TFT; TFTs; thyroid function tests; free T4; thyroid panel; T3 and T4"),
    "other_hormones": (
        "cortisol; ACTH; 24-hour urinary free cortisol; dexamethasone suppression test; PTH; prolactin; FSH; LH; "
        "oestradiol; testosterone; plasma metanephrines; aldosterone-renin ratio; IGF-1; growth hormone; "
        "insulin level; C-peptide; short Synacthen test; water deprivation test; inhibin B; AMH; "
        "17-hydroxyprogesterone; urine catecholamines; gastrin"
    ),
    "autoantibodies": (
        "ANA; anti-dsDNA; ANCA; rheumatoid factor; anti-CCP; anti-nuclear antibody; antiphospholipid antibodies; "
        "tTG-IgA; coeliac serology screen; anti-TPO; TSH receptor antibodies; acetylcholine receptor antibodies; "
        "anti-GBM; anti-mitochondrial antibody; voltage-gated calcium channel antibody; lupus anticoagulant; "
        "ENA; intrinsic factor antibody"
    ),
    "tumour_markers": (
        "PSA; CEA; CA-125; CA 19-9; AFP; alpha-fetoprotein; tumour markers; prostate-specific antigen; chromogranin A"
    ),
    "proteins_and_immunoglobulins": (
        "serum protein electrophoresis; SPEP; immunoglobulins; serum free light chains; IgE; complement levels; "
        "C3 and C4; caeruloplasmin; alpha-1 antitrypsin; total protein; tryptase; specific IgE; cryoglobulins"
    ),
    "haemolysis_and_blood_film": (
        "blood film; peripheral smear; peripheral blood smear; reticulocytes; LDH; haptoglobin; Coombs; "
        "direct antiglobulin test; haemoglobin electrophoresis; G6PD; group and save; type and screen; "
        "crossmatch; sickle screen; thick and thin blood films"
    ),
    "blood_culture": ("blood cultures; blood culture x2; Blood Cultures (two sets)"),
    "infection_serology": (
        "HIV test; hepatitis B serology; HBsAg; hepatitis panel; anti-HCV; RPR; VDRL; syphilis serology; "
        "Lyme serology; monospot; EBV serology; CMV IgM; QuantiFERON; Mantoux; tuberculin skin test; CD4 count; "
        "HIV viral load; STI screen; toxoplasma IgG; ASO titre; dengue NS1; beta-D-glucan; cryptococcal antigen; "
        "rubella IgG"
    ),
    "urine_tests": (
        "urinalysis; UA; urine dipstick; urine culture; MSU; urine MC&S; urine protein; 24-hour urine protein; "
        "urine albumin-creatinine ratio; urine sodium; urine microscopy; UPEP; urine osmolality"
    ),
    "pregnancy_test": ("pregnancy test; urine pregnancy test; beta-hCG; serum hCG; β-hCG; urine hCG"),
    "stool_tests": (
        "stool culture; faecal occult blood; FOBT; FIT test; faecal calprotectin; C. difficile toxin; C diff; "
        "stool ova and parasites; stool H. pylori antigen; faecal elastase; guaiac test"
    ),
    "swab_and_sputum": (
        "sputum culture; throat swab; rapid strep test; nasopharyngeal swab; COVID-19 PCR; influenza PCR; "
        "wound swab; high vaginal swab; chlamydia NAAT; gonorrhoea PCR; KOH prep; wet mount; AFB smear; "
        "sputum AFB; skin scraping; respiratory viral panel; Tzanck test; viral culture; wound culture; "
        "MRSA screen"
    ),
    "cerebrospinal_fluid": (
        "lumbar puncture; LP; CSF analysis; CSF glucose; CSF culture; oligoclonal bands; spinal tap"
    ),
    "joint_and_cavity_fluid": (
        "arthrocentesis; joint aspiration; synovial fluid analysis; pleural tap; thoracentesis; ascitic tap; "
        "diagnostic paracentesis; pleural fluid culture; knee aspirate; pericardiocentesis"
    ),
    "drug_levels_and_toxicology": (
        "tox screen; urine drug screen; urine toxicology; toxicology screen; UDS; paracetamol level; "
        "salicylate level; blood alcohol level; digoxin level; lithium level; blood lead level; "
        "vancomycin trough; carboxyhaemoglobin; phenytoin level"
    ),
    "genetic_tests": (
        "genetic testing; karyotype; BRCA testing; HLA-B27; CFTR mutation; JAK2; chromosomal microarray; "
        "amniocentesis; HFE gene; whole exome sequencing; cell-free DNA"
    ),
    "biopsy_and_bone_marrow": (
        "skin biopsy; punch biopsy; renal biopsy; CT-guided biopsy; ultrasound-guided biopsy; FNA; "
        "fine-needle aspiration; bone marrow biopsy; bone marrow aspirate; Pap smear; histopathology; "
        "flow cytometry; temporal artery biopsy; endometrial biopsy"
    ),
    "ecg": (
        "ECG; EKG; 12-lead ECG; 12 lead EKG; electrocardiogram; Holter; 24h Holter monitor; telemetry; loop recorder"
    ),
    "cardiac_stress_and_catheter": (
        "stress test; exercise stress test; treadmill test; coronary angiography; cardiac cath; "
        "cardiac catheterization; stress echo; myocardial perfusion scan; right heart catheterisation; "
        "dobutamine stress test"
    ),
    "echocardiography": ("echo; echocardiogram; TTE; TOE; TEE; transthoracic echocardiography; bedside echo"),
    "plain_radiography": (
        "CXR; chest x-ray; chest X Ray; PA chest radiograph; AXR; x-ray of the right hand; KUB; mammogram; "
        "mammography; barium swallow; skeletal survey; hysterosalpingogram; plain film of the abdomen; VCUG; "
        "IVP; XR knee"
    ),
    "ultrasound": (
        "US abdomen; ultrasound; abdominal ultrasound; USS pelvis; transvaginal ultrasound; "
        "Doppler US of the leg; carotid duplex; FAST scan; renal ultrasonography; FibroScan; scrotal USG; "
        "compression ultrasonography"
    ),
    "ct": (
        "CT head; head CT; non-contrast CT head; CT abdomen/pelvis; CTPA; CT pulmonary angiogram; CTA; "
        "HRCT chest; CT coronary angiography; computed tomography of the chest; CT KUB; CT urogram; CAT scan"
    ),
    "mri": (
        "MRI brain; MRI; brain MRI with contrast; MRA; MRCP; MR venogram; cardiac MRI; "
        "magnetic resonance imaging of the spine"
    ),
    "nuclear_medicine_and_bone_density": (
        "V/Q scan; bone scan; PET-CT; PET scan; DEXA; DXA; bone density scan; HIDA scan; thyroid uptake scan; "
        "radioactive iodine uptake; DMSA; sestamibi scan; DaTscan; renal scintigraphy; MUGA"
    ),
    "endoscopy": (
        "OGD; EGD; upper endoscopy; gastroscopy; colonoscopy; flexible sigmoidoscopy; bronchoscopy; cystoscopy; "
        "ERCP; capsule endoscopy; endoscopic ultrasound; hysteroscopy; colposcopy; diagnostic laparoscopy; "
        "colonoscopy with biopsy"
    ),
    "lung_function": (
        "spirometry; PFTs; pulmonary function tests; peak flow; DLCO; FeNO; methacholine challenge; "
        "lung function; 6-minute walk test; PEFR"
    ),
    "neurophysiology": (
        "EEG; EMG; nerve conduction studies; NCS/EMG; sleep study; polysomnography; visual evoked potentials; "
        "electroencephalography; MSLT"
    ),
    "bedside_and_functional_tests": (
        "Dix-Hallpike manoeuvre; tilt table test; MMSE; MoCA; PHQ-9; audiometry; visual acuity; "
        "slit lamp examination; fundoscopy; tonometry; skin prick test; patch testing; ABI; "
        "ankle-brachial index; pulse oximetry; urodynamic study; sweat chloride test; semen analysis; "
        "orthostatic vitals; urea breath test; oesophageal manometry; dermoscopy; non-stress test; CTG; "
        "depression screening; ambulatory blood pressure monitoring"
    ),
}
PAIRS = [(name.strip(), category) for category, names in ORDERED.items() for name in names.split(";")]


@pytest.mark.parametrize(("name", "category"), PAIRS)
def test_category_of_a_name(name, category):
    assert categorise(name) == category


def test_some_hundreds_of_names_in_all_38_categories():
    assert len(PAIRS) > 400
    assert set(ORDERED) == set(CATEGORIES)


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_categorys_own_name(category):
    assert categorise(category) == category
    assert categorise(category.replace("_", " ").title()) == category


NOT_ONE_EXAM = [
    "blood tests",
    "imaging",
    "Laboratory_Studies",
    "vital signs",
    "physical examination",
    "",
    "!!",
    "refer to GP",
]


@pytest.mark.parametrize("name", NOT_ONE_EXAM)
def test_containers_and_others_are_unknown(name):
    assert categorise(name) == "unknown"
    assert categories(name) == ()


def test_panels_order_several_categories():
    assert categories("Comprehensive_Metabolic_Panel") == ("electrolytes_and_renal_function", "liver_function")
    assert categories("Blood_and_Urine_Cultures") == ("blood_culture", "urine_tests")


# Top-level names that hold tests or are no examination: what they hold is categorised instead.
CONTAINERS = {
    *("Basic_Laboratory_Tests", "Blood_Tests", "Blood_Work", "Blood_Works", "Head_Imaging", "Imaging"),
    *("Imaging_And_Other_Tests", "Imaging_Results", "Imaging_Studies", "Interventions", "Lab_Results", "Lab_Work"),
    *("Laboratory_Studies", "Laboratory_Tests", "Other_Tests", "Others", "Routine_Blood_Tests", "Screening_Tests"),
    *("Serum_Laboratory_Analysis", "Serum_Laboratory_Values", "Serum_Levels", "Serum_Studies", "Special_Tests"),
    *("Vital_Signs_Trend", "Vital_Signs_at_Presentation"),
}


def test_every_name_of_the_osce_cases():
    """Each top-level name of AgentClinic's results has a category or is a container of names."""
    folder = shared_data("agentclinic")
    tests: dict[str, object] = {}
    for line in (folder / "agentclinic_medqa_extended.jsonl").read_text(encoding="utf-8").splitlines():
        tests.update(json.loads(line)["OSCE_Examination"].get("Test_Results") or {})
    assert len(tests) > 100
    assert {name for name in tests if categorise(name) == "unknown"} <= CONTAINERS
